"""The environment in which the processes of an engine beside the trainer start."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch


def own_gpu() -> str:
    """Return the name of this rank's GPU in CUDA_VISIBLE_DEVICES, "" where there is none."""
    if not torch.cuda.is_available():
        return ""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    mine = torch.cuda.current_device()
    return visible[mine] if visible != [""] else str(mine)


@contextmanager
def rank_environment(gpus: Sequence[str]) -> Iterator[None]:
    """Show processes started in the block only these GPUs and no variables of the launcher.

    Otherwise vLLM takes the first GPU, and torch connects to torchrun's store. Without a GPU they
    compile nothing: vLLM's sampler would compile one small function for ten seconds.
    """
    before = dict(os.environ)
    for name in before:
        if name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE") or name.startswith(
            ("MASTER_", "TORCHELASTIC_", "GROUP_")
        ):
            del os.environ[name]
    if torch.cuda.is_available():
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    else:
        os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
        if len(gpus) > 1:  # vLLM would want a NUMA node for each worker
            os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    try:
        yield
    finally:
        for name in ("CUDA_VISIBLE_DEVICES", "TORCH_COMPILE_DISABLE", "VLLM_CPU_OMP_THREADS_BIND"):
            os.environ.pop(name, None)
        os.environ.update(before)

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
    try:
        yield
    finally:
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)
        os.environ.pop("TORCH_COMPILE_DISABLE", None)
        os.environ.update(before)

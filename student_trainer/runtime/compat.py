"""The private names of other people's code that the trainer calls or reads, one function each.

An upgrade may change them without a word. `test_compat_names.py` then fails first, and names what
changed. It also holds the signatures of what cannot be moved here:

================================= ==============================================================
overridden method of `Trainer`    where, and why there is no public one
================================= ==============================================================
`_get_output_dir`,                `training.durable`: nothing says where checkpoints are written,
`_save_checkpoint`,               and `on_save` comes when one is complete
`_push_from_checkpoint`
`_get_grad_norm`                  `training.trainer`: `on_pre_optimizer_step` is not told the norm
================================= ==============================================================

All are of transformers 5.19.0. ``evaluation/_harness.py`` and ``evaluation/_fences.py`` name
private modules of CPython 3.11, to close them to the code that is graded. They run alone in the
interpreter of the sandbox, which cannot import this file.
"""

from __future__ import annotations

import atexit
import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import httpcore
    import httpx
    import torch


KEY_WARNINGS = ("There were missing keys in the", "There were unexpected keys in the")


def run_exit_functions() -> None:
    """Wait for threads and call what `atexit` has registered, as the interpreter does at its end.

    Calls ``threading._shutdown`` and ``atexit._run_exitfuncs``, from CPython 3.11. `sys.exit` would
    do both, and then finalize the interpreter; there is no public way to do one without the other.
    """
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()


def set_network_backend(transport: httpx.HTTPTransport, backend: httpcore.NetworkBackend) -> None:
    """Let a transport open its connections by another backend.

    Writes ``HTTPTransport._pool`` and ``ConnectionPool._network_backend``, from httpx 0.28.1 and
    httpcore 1.0.9. httpx makes the pool itself and has no argument for the backend.
    """
    transport._pool._network_backend = backend


def attention_of(config: Any) -> str:
    """Return the attention implementation of a model's (text) configuration.

    Reads ``PreTrainedConfig._attn_implementation``, from transformers 5.19.0. Nothing public tells
    it; `PreTrainedModel.set_attn_implementation` only sets it.
    """
    found: str = config._attn_implementation
    return found


def set_attention(config: Any, implementation: str) -> None:
    """Set what `attention_of` returns, for the part of a model that the configuration is of.

    Writes ``PreTrainedConfig._attn_implementation``, from transformers 5.19.0. The public
    `PreTrainedModel.set_attn_implementation` sets all parts of a model, and may load a kernel.
    """
    config._attn_implementation = implementation


def is_flash_attention_requested(config: Any) -> bool:
    """Return whether a model's configuration asks for any kind of flash attention.

    Calls a function of ``transformers.utils.generic``, from transformers 5.19.0. Nothing public
    knows all names of such kernels.
    """
    from transformers.utils import generic

    return bool(generic.is_flash_attention_requested(config))


def has_gradient_hooks(weight: torch.Tensor) -> bool:
    """Return whether something is called when a weight's gradient is computed or added.

    Reads ``_backward_hooks`` and ``_post_accumulate_grad_hooks``, from torch 2.13.0.
    """
    return bool(weight._backward_hooks or weight._post_accumulate_grad_hooks)


def gloo_group(store: Any, rank: int, size: int, devices: Sequence[Any], timeout: timedelta) -> Any:
    """Join a group over gloo that is reached at these devices.

    Writes ``ProcessGroupGloo._Options``, from torch 2.13.0. Publicly they come from the environment
    alone, which holds for all groups of a process.
    """
    from torch.distributed import ProcessGroupGloo

    kind: Any = ProcessGroupGloo
    options = kind._Options()
    options._devices, options._timeout = list(devices), timeout
    return kind(store, rank, size, options)


def revert_weight_conversion(model: Any, weights: dict[str, Any]) -> dict[str, Any]:
    """Return a model's weights under the names, and in the shapes, of its published checkpoint.

    Calls a function of ``transformers.core_model_loading``, from transformers 5.19.0. Publicly only
    `save_pretrained` does so, which also writes files.
    """
    from transformers import core_model_loading

    reverted: dict[str, Any] = core_model_loading.revert_weight_conversion(model, weights)
    return reverted


def sort_checkpoints(output: str, prefix: str) -> list[str]:
    """Return the checkpoints of a folder, the oldest first.

    Calls a function of ``transformers.trainer_utils``, from transformers 5.19.0: the Trainer's own
    order, which has no documented name.
    """
    from transformers import trainer_utils

    found: list[str] = trainer_utils.sort_checkpoints(output, prefix, use_mtime=True)
    return found


@contextmanager
def without_key_warnings() -> Iterator[None]:
    """Leave out the Trainer's warnings of weights that a checkpoint names otherwise.

    Drops records of the logger ``transformers.trainer`` by their text, from transformers 5.19.0.
    They are wrong where the weights are loaded again by the names of the checkpoint.
    """

    def keep(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(KEY_WARNINGS)

    theirs = logging.getLogger("transformers.trainer")
    theirs.addFilter(keep)
    try:
        yield
    finally:
        theirs.removeFilter(keep)


@contextmanager
def names_kept(groups: tuple[str, ...]) -> Iterator[None]:
    """Let TensorBoard, wandb and their like keep the names that begin with one of ``groups``.

    Replaces ``integration_utils.rewrite_logs`` inside the block, from transformers 5.19.0. It puts
    ``train/`` before every name but ``eval_*`` and ``test_*``, ``train/loss`` too, and its callers
    have no argument for it.
    """
    from transformers.integrations import integration_utils

    rewrite = integration_utils.rewrite_logs

    def keep(logs: dict[str, Any]) -> dict[str, Any]:
        kept = {name: value for name, value in logs.items() if name.startswith(groups)}
        rest = {name: value for name, value in logs.items() if name not in kept}
        return kept | rewrite(rest)

    integration_utils.rewrite_logs = keep
    try:
        yield
    finally:
        integration_utils.rewrite_logs = rewrite

"""The choice of implementation for a chunk: the closed form in PyTorch, or Triton on a GPU."""

from __future__ import annotations

import importlib.util
import os
from typing import Literal, Protocol

import torch

from student_trainer.losses import closed_form
from student_trainer.losses.distribution import HardLabels, SparseDistribution
from student_trainer.losses.divergence import Divergence, LossOutput

Kernel = Literal["auto", "torch", "triton"]


class ChunkStep(Protocol):
    """A module that computes divergence and gradient of a chunk of logits.

    Attributes:
        ROW_MULTIPLE: it is fastest on rows whose strides this number of elements divides.
    """

    ROW_MULTIPLE: int

    def logits_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Return the dtype of logits given to the module for ``dtype``, and of their gradient."""
        ...

    def divergence_and_gradient(
        self,
        logits: torch.Tensor,
        teacher: SparseDistribution,
        divergence: Divergence,
        *,
        scale: float = 1.0,
        weights: torch.Tensor | None = None,
        labels: HardLabels | None = None,
        softcap: float | None = None,
        with_gradient: bool,
        out: torch.Tensor | None = None,
    ) -> LossOutput:
        """Compute as `closed_form.divergence_and_gradient` does."""
        ...


def choose_kernel(kernel: Kernel, logits: torch.Tensor) -> ChunkStep:
    """Return the module for logits (or hidden states) of this device and dtype.

    Raises:
        ValueError: the kernel is unknown, or "triton" cannot run here.
    """
    if kernel not in ("auto", "torch", "triton"):
        raise ValueError(f"kernel {kernel!r} must be 'auto', 'torch' or 'triton'")
    obstacle = _obstacle(logits.device.type, logits.dtype) if kernel != "torch" else ""
    if kernel == "torch" or (kernel == "auto" and (obstacle or not logits.is_cuda)):
        return closed_form
    if obstacle:
        raise ValueError(f"kernel 'triton' {obstacle}; use 'auto' or 'torch'")
    from student_trainer.losses import triton

    return triton


def empty_rows(
    step: ChunkStep, like: torch.Tensor, size: tuple[int, int], dtype: torch.dtype
) -> torch.Tensor:
    """Return an uninitialised matrix of ``size`` on the device of ``like``, with padded rows."""
    count, width = size
    stride = -(-width // step.ROW_MULTIPLE) * step.ROW_MULTIPLE
    return like.new_empty((count, stride), dtype=dtype)[:, :width]


def _obstacle(device: str, dtype: torch.dtype) -> str:
    """Return why Triton cannot compute this, or an empty text; its interpreter runs on a CPU."""
    if importlib.util.find_spec("triton") is None:
        return "is not installed (pip install triton)"
    if device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"needs a GPU, the logits are on {device}"
    if dtype == torch.float64:
        return "computes in float32, the logits are float64"
    return ""

"""The targets of the loss: `SparseDistribution` of a teacher, and `HardLabels` of the data."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class SparseDistribution:
    """The teacher's distributions at N positions: at most K tokens each, and a tail for the rest.

    Attributes:
        token_ids: [N, K] int64, no id twice at a position; −1 pads.
        logprobs: [N, K] floating, normalised over the full vocabulary; ignored at pads.
        tail_logprob: [N] floating, log of the mass on all other tokens; −inf when there is none.
        offset: [N] floating for distributions that are estimated from draws, or None: nats to add
            to each position's divergence, so that its mean is right; without gradient.

    Raises:
        ValueError: shapes or dtypes do not fit together.
    """

    token_ids: torch.Tensor
    logprobs: torch.Tensor
    tail_logprob: torch.Tensor
    offset: torch.Tensor | None = None

    def __post_init__(self) -> None:
        ids = self.token_ids
        if ids.ndim != 2 or ids.dtype != torch.int64 or ids.shape[1] == 0:
            raise ValueError(
                f"token_ids must be int64 [N, K] with K at least 1, got {self.token_ids.dtype} "
                f"{list(self.token_ids.shape)}"
            )
        if self.logprobs.shape != self.token_ids.shape:
            raise ValueError(
                f"logprobs must be [N, K] = {list(self.token_ids.shape)} like token_ids, got "
                f"{list(self.logprobs.shape)}"
            )
        if self.tail_logprob.shape != self.token_ids.shape[:1]:
            raise ValueError(
                f"tail_logprob must be [N] = {list(self.token_ids.shape[:1])}, got "
                f"{list(self.tail_logprob.shape)}"
            )

    def __repr__(self) -> str:
        positions, width = self.token_ids.shape
        return f"SparseDistribution(N={positions}, K={width}, {self.logprobs.device})"

    def __len__(self) -> int:
        return self.token_ids.shape[0]

    def __getitem__(self, positions: slice) -> SparseDistribution:
        return SparseDistribution(
            self.token_ids[positions],
            self.logprobs[positions],
            self.tail_logprob[positions],
            None if self.offset is None else self.offset[positions],
        )

    def to(self, device: torch.device | str) -> SparseDistribution:
        return SparseDistribution(
            self.token_ids.to(device),
            self.logprobs.to(device),
            self.tail_logprob.to(device),
            None if self.offset is None else self.offset.to(device),
        )


@dataclass(frozen=True)
class HardLabels:
    """The data's token at each of N positions, for its cross-entropy.

    Attributes:
        token_ids: [N] int64, in the teacher's support or not.
        weights: [N] floating, weight of each position's cross-entropy in the loss; None to measure
            it only.

    Raises:
        ValueError: shapes or dtypes do not fit together.
    """

    token_ids: torch.Tensor
    weights: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if self.token_ids.ndim != 1 or self.token_ids.dtype != torch.int64:
            raise ValueError(
                f"labels must be int64 [N], got {self.token_ids.dtype} {list(self.token_ids.shape)}"
            )
        if self.weights is not None and self.weights.shape != self.token_ids.shape:
            raise ValueError(
                f"label weights must be [N] = {list(self.token_ids.shape)}, got "
                f"{list(self.weights.shape)}"
            )

    def __len__(self) -> int:
        return self.token_ids.shape[0]

    def __getitem__(self, positions: slice) -> HardLabels:
        return HardLabels(
            self.token_ids[positions], None if self.weights is None else self.weights[positions]
        )

    def to(self, device: torch.device | str) -> HardLabels:
        return HardLabels(
            self.token_ids.to(device), None if self.weights is None else self.weights.to(device)
        )

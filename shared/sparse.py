"""`SparseLogprobs`: the arrays of one scored sequence."""

from __future__ import annotations

import numpy as np
from pydantic import BaseModel, ConfigDict, model_validator

from shared.arrays import Logprobs1D, Logprobs2D, TokenIds2D
from shared.errors import TeacherAnswerError


class SparseLogprobs(BaseModel):
    """The teacher's next-token distribution over one completion, T rows, sparse.

    Row t predicts the token at position ``completion_start + t``. Every log-prob is normalised over
    the teacher's full vocabulary at the temperature of the request.

    Attributes:
        token_ids: [T, k] uint32, the k most probable tokens, most probable first; or, for a request
            with ``sample_seed``, k draws from the distribution, in which a token may repeat.
        logprobs: [T, k] float32 or float16; in float16 whatever is below −65504 stands as that.
        next_token_logprob: [T] float32, of the token that really came next.
        tail_logprob: [T] float32, log of the mass on every token that the row does not name:
            neither in ``token_ids``, nor the next token, nor requested. −inf when none is left.
        requested_logprobs: [T, m] float32 or float16, of the requested ids, or None.

    Source: the coarse-grained teacher of the design contract; adding the next token's mass to
    the tail is exact, subtracting it would not be, so the tail excludes it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    token_ids: TokenIds2D
    logprobs: Logprobs2D
    next_token_logprob: Logprobs1D
    tail_logprob: Logprobs1D
    requested_logprobs: Logprobs2D | None = None

    @model_validator(mode="after")
    def _shapes_agree(self) -> SparseLogprobs:
        rows, k = self.token_ids.shape
        shapes = {
            "logprobs": (self.logprobs.shape, (rows, k)),
            "next_token_logprob": (self.next_token_logprob.shape, (rows,)),
            "tail_logprob": (self.tail_logprob.shape, (rows,)),
        }
        if self.requested_logprobs is not None:
            requested = self.requested_logprobs.shape
            shapes["requested_logprobs"] = (requested, (rows, requested[1]))
        for name, (found, expected) in shapes.items():
            if found != expected:
                raise ValueError(f"{name} has shape {list(found)}, expected {list(expected)}")
        return self

    def __len__(self) -> int:
        return int(self.token_ids.shape[0])

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays, as they travel."""
        arrays = (
            self.token_ids,
            self.logprobs,
            self.next_token_logprob,
            self.tail_logprob,
            self.requested_logprobs,
        )
        return sum(array.nbytes for array in arrays if array is not None)

    def require_finite(self, name: str) -> None:
        """Refuse NaN and infinities; only ``tail_logprob`` may be −inf (an empty tail).

        Args:
            name: how the message calls the sequence.

        Raises:
            TeacherAnswerError: names the sequence, the field, the row and the value.
        """
        for field in ("logprobs", "next_token_logprob", "tail_logprob", "requested_logprobs"):
            array = getattr(self, field)
            if array is None:
                continue
            bad = ~np.isfinite(array)
            if field == "tail_logprob":
                bad &= array != -np.inf
            if bad.any():
                index = tuple(int(i) for i in np.argwhere(bad)[0])
                raise TeacherAnswerError(
                    f"{name}: the teacher answered {field}{list(index)} = {array[index]}; "
                    "its log-probs must be finite. Check the teacher's weights and dtype "
                    "(float16 overflows in some models; try --dtype bfloat16 or float32)"
                )

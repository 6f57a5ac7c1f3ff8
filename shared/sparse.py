"""The arrays of one scored sequence, `SparseLogprobs`."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, model_validator

from shared.arrays import Logprobs1D, Logprobs2D, TokenIds2D
from shared.errors import TeacherAnswerError
from shared.unknown_fields import refuse_unknown_fields

# Rounding to float16 changes a log-prob by up to 2⁻¹¹ of itself, and the mass at a position by less
# than 0.006.
_SLACK = 0.01


class SparseLogprobs(BaseModel):
    """The teacher's sparse next-token distributions at the T positions of one completion.

    Position t predicts the token at ``completion_start + t``. Every log-prob is normalised over the
    teacher's full vocabulary at the temperature of the request.

    Attributes:
        token_ids: [T, k] uint32, the k most probable tokens, most probable first; or, for a request
            with ``sample_seed``, k draws from the distribution, in which a token may repeat.
        logprobs: [T, k] float32 or float16; in float16 lower values are −65504.
        next_token_logprob: [T] float32, of the token that really came next.
        tail_logprob: [T] float32, log of the mass on all other tokens: neither in ``token_ids``,
            nor the next token, nor requested. −inf when none is left.
        requested_logprobs: [T, m] float32 or float16, of the requested ids, or None.

    The tail excludes the next token, because adding that token's mass to it later is exact, and
    subtracting it would not be.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    token_ids: TokenIds2D
    logprobs: Logprobs2D
    next_token_logprob: Logprobs1D
    tail_logprob: Logprobs1D
    requested_logprobs: Logprobs2D | None = None

    _unknown_fields = model_validator(mode="before")(refuse_unknown_fields)

    def __repr__(self) -> str:
        positions, k = self.token_ids.shape
        found = self.requested_logprobs
        more = "" if found is None else f", {found.shape[1]} requested"
        return f"SparseLogprobs({positions} positions, k={k}{more})"

    __str__ = __repr__

    @model_validator(mode="after")
    def _shapes_agree(self) -> SparseLogprobs:
        positions, k = self.token_ids.shape
        shapes = {
            "logprobs": (self.logprobs.shape, (positions, k)),
            "next_token_logprob": (self.next_token_logprob.shape, (positions,)),
            "tail_logprob": (self.tail_logprob.shape, (positions,)),
        }
        if self.requested_logprobs is not None:
            requested = self.requested_logprobs.shape
            shapes["requested_logprobs"] = (requested, (positions, requested[1]))
        for name, (found, expected) in shapes.items():
            if found != expected:
                raise ValueError(f"{name} has shape {list(found)}, expected {list(expected)}")
        return self

    def __len__(self) -> int:
        return int(self.token_ids.shape[0])

    @property
    def nbytes(self) -> int:
        """The size of all arrays as they travel, in bytes."""
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
            name: of the sequence, for the message.

        Raises:
            TeacherAnswerError: names the sequence, the field, the position and the value.
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

    def require_plausible(
        self, name: str, next_ids: NDArray[np.uint32], *, drawn: bool = False
    ) -> None:
        """Refuse arrays that cannot be distributions over the tokens that followed.

        At each position no id may stand twice, and the most probable ids stand first. A token's two
        log-probs at one position must agree, and a next token outside the top-k must be less
        probable than those in it. So scores of another sequence, or in another order, are found
        out.

        Args:
            name: of the sequence, for the message.
            next_ids: [T], the tokens that really came next.
            drawn: ``token_ids`` are a sampled support: tokens may repeat, in any order.

        Raises:
            TeacherAnswerError: names the sequence, the field, the position and the value.
        """
        for field in ("logprobs", "next_token_logprob", "tail_logprob", "requested_logprobs"):
            array = getattr(self, field)
            if array is not None and (array > _SLACK).any():
                index = tuple(int(i) for i in np.argwhere(array > _SLACK)[0])
                raise TeacherAnswerError(
                    f"{name}: the teacher answered {field}{list(index)} = {array[index]}, which is "
                    "no log-prob: it is above 0"
                )
        if not drawn:
            ordered = np.sort(self.token_ids, axis=1)
            twice = ordered[:, 1:] == ordered[:, :-1]
            if twice.any():
                t, place = (int(i) for i in np.argwhere(twice)[0])
                raise TeacherAnswerError(
                    f"{name}: the teacher answered token id {ordered[t, place]} twice in row {t}"
                )
        named = self.token_ids == next_ids[:, None]  # [T, k]
        again = named.any(axis=1)
        top = self.logprobs.astype(np.float32)
        own = np.maximum(self.next_token_logprob, np.finfo(self.logprobs.dtype).min)  # [T]
        there = np.where(named, top, -np.inf).max(axis=1, initial=-np.inf)
        with np.errstate(invalid="ignore"):  # −∞ where the next token is not in the support
            wrong = again & (np.abs(there - own) > _SLACK + 2.0**-10 * np.abs(own))
        if not drawn:
            wrong |= ~again & (own > top.min(axis=1, initial=np.inf) + _SLACK)
        if wrong.any():
            t = int(np.argmax(wrong))
            raise TeacherAnswerError(
                f"{name}: the teacher answered next_token_logprob[{t}] = {own[t]}, and its "
                "top-k contradicts that: the rows are of another sequence, or in another order"
            )
        if drawn:
            return
        rises = np.diff(top, axis=1) > _SLACK
        if rises.any():
            t, place = (int(i) for i in np.argwhere(rises)[0])
            raise TeacherAnswerError(
                f"{name}: the teacher answered logprobs[{t}, {place + 1}] = "
                f"{top[t, place + 1]} after {top[t, place]}; a top-k goes from the most "
                "probable down"
            )
        mass = np.exp(top).sum(axis=1) + np.exp(self.tail_logprob)
        mass += np.where(again, 0.0, np.exp(own))
        if (mass > 1.0 + _SLACK).any():
            t = int(np.argmax(mass))
            raise TeacherAnswerError(
                f"{name}: the probabilities that the teacher answered in row {t} sum to "
                f"{mass[t]:.4g}, which is more than 1"
            )

"""The interface of rollout engines: request, rollout and `RolloutEngine`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from shared.sampling import uniforms
from shared.text import Ids, StopSearch

# Starts a search for stop strings in the completion of a prompt [P].
StartSearch = Callable[[Ids], StopSearch]


@dataclass(frozen=True)
class RolloutRequest:
    """A prompt [P] uint32 and the key of its random numbers.

    Equal keys draw equal random numbers, whatever else is in the batch or on other ranks. The
    completions are then equal too, but for rounding: the order in which a matrix product is summed
    depends on the shape of the batch, and a draw within that difference takes the neighbouring
    token. In float32 that is rare (measured on random models: one token in 20,000 to 350,000); in
    half precision it is more frequent.
    """

    prompt_ids: NDArray[np.uint32]
    key: tuple[int | str, ...]

    @property
    def seed(self) -> int:
        """The seed of an engine that draws its random numbers itself, in [0, 2**53)."""
        return int(uniforms(*self.key, count=1)[0] * 2**53)


@dataclass(frozen=True)
class TokenFilter:
    """The choice of the tokens that one is drawn from, after the temperature.

    A token must pass all three, in vLLM's order: `min_p`, then `top_k`, then `top_p` of what the
    two leave. With any of them, completions are not samples of the student's own distribution.

    Attributes:
        top_p: keep the most probable tokens that together have this share; 1 keeps all.
        top_k: keep so many of the most probable tokens, and those equal to the last; 0 keeps all.
        min_p: keep tokens of at least this share of the largest probability; 0 keeps all.
    """

    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0


NO_FILTER = TokenFilter()


@dataclass(frozen=True)
class Rollout:
    """A generated completion.

    Attributes:
        token_ids: its ids [T] uint32, the stop token among them.
        truncated: it reached the limit.
        proposed: the student's m most probable ids [T, m] uint32 at each position, by the weights
            that wrote the completion; None if the engine was not asked for them.
    """

    token_ids: NDArray[np.uint32]
    truncated: bool
    proposed: NDArray[np.uint32] | None = None


class RolloutEngine(Protocol):
    """An engine that generates completions with the student's weights as of the last `sync`.

    Attributes:
        elsewhere: the engine runs in other processes with its own copy of the weights, so
            `generate` may run in a thread while the student trains. It must end before the next
            `sync` or `generate`. Its rollouts bring ``proposed`` ids, where any are wanted.
    """

    elsewhere: bool

    def sync(self, weight_version: int) -> None:
        """Load the student's present weights, unless the engine has this version already."""
        ...

    def generate(self, requests: Sequence[RolloutRequest]) -> Iterator[list[tuple[int, Rollout]]]:
        """Yield groups of (index of the request, rollout), each as soon as it is finished.

        The number of groups and their times differ between ranks. If ranks share a sharded model,
        the caller must not run it between groups, unless the engine yields a single group.
        """
        ...


def vllm_sampling(
    *,
    stop_ids: Sequence[int],
    max_new_tokens: int,
    temperature: float,
    token_filter: TokenFilter,
    student_top_m: int,
    vocab_size: int,
    output_size: int,
) -> dict[str, Any]:
    """Return what all completions of a run give vLLM's `SamplingParams`: all but the seed.

    What is off is named too, because a server has defaults of the checkpoint's own
    ``generation_config.json``.

    Args:
        student_top_m: ids that are proposed at each position; 0 for none.
        vocab_size: number of ids that may be sampled.
        output_size: number of ids that the output layer has, its padding among them.
    """
    return {
        "max_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": token_filter.top_p,
        "top_k": token_filter.top_k,
        "min_p": token_filter.min_p,
        "repetition_penalty": 1.0,
        "stop_token_ids": list(stop_ids),
        "logit_bias": dict.fromkeys(range(vocab_size, output_size), -100.0) or None,
        "detokenize": False,
        **candidates_wanted(student_top_m, output_size),
    }


def candidates_wanted(student_top_m: int, output_size: int) -> dict[str, int]:
    """Return what `proposed_ids` needs of vLLM's `SamplingParams`; empty if nothing is proposed.

    vLLM tells the sampled token first, so one more is wanted for the places after it.
    """
    return {"logprobs": min(student_top_m + 1, output_size)} if student_top_m else {}


def proposed_ids(
    candidates: Sequence[Sequence[tuple[int, float]]], count: int, vocab_size: int
) -> NDArray[np.uint32]:
    """Return the ids [T, count] uint32 of the most probable candidates, most probable first.

    Args:
        candidates: (id, log-prob) of each position [T], equally many and at least ``count`` of
            each, no id twice.
        vocab_size: only ids below it are proposed. Where the padding of an output layer takes
            places, the lowest ids that are no candidates fill them.
    """
    if not candidates:
        return np.empty((0, count), np.uint32)
    pairs = np.array(candidates, np.float64)  # [T, c, 2]; ids are exact in float64
    ids, logprobs = pairs[..., 0].astype(np.uint32), pairs[..., 1]  # [T, c]
    order = np.where(ids < vocab_size, -logprobs, np.inf).argsort(-1, kind="stable")
    best = np.take_along_axis(ids, order, -1)[:, :count]  # [T, count]
    for row in np.flatnonzero((best >= vocab_size).any(-1)):
        known = best[row][best[row] < vocab_size]
        best[row] = [*known, *_lowest_others(known, count - len(known))]
    return best


def _lowest_others(ids: NDArray[np.uint32], count: int) -> NDArray[np.uint32]:
    """Return the ``count`` lowest ids that are not among ``ids``."""
    return np.setdiff1d(np.arange(len(ids) + count, dtype=np.uint32), ids)[:count]

"""The right answer of a teacher, computed plainly: one sequence, all logits, float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

from shared.protocol import ScoreSequence
from shared.sparse import SparseLogprobs


def load_model(folder: Path, dtype: str = "float32") -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@torch.inference_mode()
def dense_logprobs(
    model: Any, token_ids: NDArray[Any], start: int, temperature: float
) -> NDArray[np.float64]:
    """Return the float64 log-softmax [T, V] of the model's logits at the completion's positions."""
    logits = model(torch.from_numpy(token_ids.astype(np.int64))[None]).logits[0, start - 1 : -1]
    dense: NDArray[np.float64] = (logits.double() / temperature).log_softmax(dim=-1).numpy()
    return dense


def sample(dense: NDArray[np.float64], uniform: float) -> int:
    """Return the token that inverse-CDF sampling draws from log-probs [V]."""
    cdf = np.exp(dense).cumsum()
    return int(np.searchsorted(cdf, uniform * cdf[-1], side="right"))


def largest_error(
    answer: SparseLogprobs, dense: NDArray[np.float64], sequence: ScoreSequence
) -> float:
    """Return the largest difference of any array of ``answer`` from ``dense`` [T, V].

    The top-k ids are judged by their log-probs, so that two equal tokens may stand in either order.
    """
    rows = np.arange(len(dense))
    following = np.asarray(sequence.token_ids[sequence.completion_start :], np.int64)  # [T]
    ids = answer.token_ids.astype(np.int64)  # [T, k]
    k = ids.shape[1]
    assert all(len(set(row)) == k for row in ids.tolist())
    named = np.zeros(dense.shape, bool)
    named[rows[:, None], ids] = True
    named[rows, following] = True
    pairs = [
        (answer.logprobs, dense[rows[:, None], ids]),
        (answer.logprobs, -np.sort(-dense, axis=1)[:, :k]),
        (answer.next_token_logprob, dense[rows, following]),
    ]
    if sequence.requested_token_ids is not None:
        requested = sequence.requested_token_ids.astype(np.int64)  # [T, m]
        named[rows[:, None], requested] = True
        assert answer.requested_logprobs is not None
        pairs.append((answer.requested_logprobs, dense[rows[:, None], requested]))
    with np.errstate(divide="ignore"):
        tail = np.log(np.where(named, 0.0, np.exp(dense)).sum(axis=1))  # [T]
    empty = np.isneginf(answer.tail_logprob)
    assert (empty == named.all(axis=1)).all()
    pairs.append((answer.tail_logprob[~empty], tail[~empty]))
    return max(float(np.abs(a - b).max(initial=0.0)) for a, b in pairs)

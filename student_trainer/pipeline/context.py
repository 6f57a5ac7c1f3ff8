"""The divergence between a teacher with a prompt of its own and the same one without."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from shared.sparse import SparseLogprobs

_LEAST = 1e-12  # tail mass that float32 log-probs can tell from none


def context_divergence(seen: SparseLogprobs, unseen: SparseLogprobs) -> NDArray[np.float64]:
    """Return KL(teacher with its own prompt ‖ the same with the student's) at each position, [T].

    The outcomes are the top-k of the first, and everything else as one, so it is a lower bound of
    the divergence over the whole vocabulary, in nats.

    Args:
        seen: scores of a completion behind the teacher's own prompt, [T, k].
        unseen: scores of the same completion behind the student's prompt; its requested ids are the
            top-k of ``seen``, or the first of them.
    """
    assert unseen.requested_logprobs is not None  # the teacher's client has checked it
    q = unseen.requested_logprobs.astype(np.float64)  # [T, m]
    p = seen.logprobs[:, : q.shape[1]].astype(np.float64)
    p_tail, q_tail = _tail(p), _tail(q)
    return np.asarray((np.exp(p) * (p - q)).sum(axis=1) + p_tail * np.log(p_tail / q_tail))


def _tail(logprobs: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the mass [T] beside the named outcomes [T, k]."""
    return np.maximum(1.0 - np.exp(logprobs).sum(axis=1), _LEAST)

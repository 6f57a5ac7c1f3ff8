"""A teacher served in bfloat16 answers from float32 logits, on either backend."""

import httpx
import numpy as np


def test_log_probs_are_finer_than_bfloat16(half):
    """In bfloat16 the 272 logits of a position take at most some 245 values: the others tie."""
    ids = [5 * i % 260 for i in range(12)]
    body = {
        "sequences": [{"token_ids": ids, "completion_start": 4}],
        "top_k": 272,
        "logprob_dtype": "float32",
    }
    answer = httpx.post(f"{half.url}/v1/score", json=body).raise_for_status().json()
    logprobs = np.asarray(answer["sequences"][0]["logprobs"])
    assert logprobs.shape == (8, 272)
    assert all(len(np.unique(row)) > 265 for row in logprobs)

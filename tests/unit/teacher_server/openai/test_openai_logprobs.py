"""OpenAI's lists of log-probs."""

import json

import numpy as np

from shared.sparse import SparseLogprobs
from teacher_server.openai.answers import completion_logprobs


def test_of_tokens_that_read_alike_the_most_probable_counts():
    """Else the greedy token could not be told by its value, and a token beside it would be one."""
    scores = SparseLogprobs(
        token_ids=np.array([[7, 8], [7, 8], [7, 8]], np.uint32),
        logprobs=np.array([[-1, -2]] * 3, np.float32),
        next_token_logprob=np.array([-1, -2, -3], np.float32),
        tail_logprob=np.array([-1, -1, -1], np.float32),
    )
    ids = np.array([7, 8, 9], np.uint32)
    rows = completion_logprobs([(ids[:1], None), (ids, scores)], 2, lambda token_id: "\ufffd")
    assert rows["token_logprobs"] == [None, -1, -2, -3]
    top = [row and json.loads(row) for row in rows["top_logprobs"]]
    assert top == [None, *[{"\ufffd": -1}] * 3]
    assert rows["text_offset"] == [0, 1, 2, 3]

"""The ids that a rollout engine proposes beside its completions."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from student_trainer.rollouts.base import candidates_wanted, proposed_ids


def test_the_sampled_token_takes_no_place_of_a_likelier_one():
    sampled_first = [(7, -5.0), (3, -0.1), (1, -2.0)]
    assert proposed_ids([sampled_first], 2, 10).tolist() == [[3, 1]]
    assert proposed_ids([[(3, -0.1), (1, -2.0), (7, -5.0)]], 2, 10).tolist() == [[3, 1]]


def test_padding_of_the_output_layer_is_never_proposed():
    assert proposed_ids([[(11, -0.1), (0, -0.2), (12, -0.3)]], 2, 10).tolist() == [[0, 1]]


def test_no_positions_are_no_ids():
    assert proposed_ids([], 4, 10).shape == (0, 4)
    assert candidates_wanted(0, 10) == {}


@given(st.data())
def test_ids_are_those_of_a_stable_sort_and_no_id_occurs_twice(data):
    vocab_size, padding = 12, 3
    logprobs = np.array(
        data.draw(st.lists(st.floats(-20, 0), min_size=15, max_size=15)), np.float32
    )
    count = data.draw(st.integers(1, vocab_size))
    order = np.argsort(-logprobs, kind="stable")[: count + 1 + padding]
    sampled = data.draw(st.sampled_from(range(len(logprobs))))
    told = [sampled, *(int(id) for id in order if id != sampled)][: len(order)]
    [ids] = proposed_ids([[(id, float(logprobs[id])) for id in told]], count, vocab_size).tolist()
    assert len(set(ids)) == count
    assert max(ids) < vocab_size
    best = np.sort(logprobs[:vocab_size])[::-1][:count]
    assert np.array_equal(np.sort(logprobs[ids])[::-1], best)

"""Turns of clients: even in tokens, whatever they queue, drop, or saved up."""

from hypothesis import given
from hypothesis import strategies as st

from teacher_server.limits.fairness import FairQueue

queues = st.dictionaries(
    st.sampled_from("abc"), st.lists(st.integers(1, 100), min_size=1, max_size=30), min_size=2
)


@given(queues, st.data())
def test_clients_that_wait_are_served_alike_to_one_job(queues, data):
    """Source: theorem 1 of the paper, for jobs of at most 100 tokens."""
    fair_queue = FairQueue()
    waiting = [
        (fair_queue.start(client, tokens), client, tokens)
        for client, queue in queues.items()
        for tokens in queue
    ]
    served = dict.fromkeys(queues, 0)
    while len({client for _, client, _ in waiting}) == len(queues):
        turn = min(waiting)
        waiting.remove(turn)
        fair_queue.begun(turn[0])
        served[turn[1]] += turn[2]
        assert max(served.values()) - min(served.values()) <= 100


def test_who_comes_late_is_served_now_and_has_saved_nothing_up():
    fair_queue = FairQueue()
    for start in (fair_queue.start("a", 10) for _ in range(50)):
        fair_queue.begun(start)
    assert fair_queue.start("b", 10) == 490  # beside the job that runs, not before all of the past
    assert [fair_queue.start("a", 10), fair_queue.start("b", 10)] == [500, 500]


def test_what_was_dropped_puts_nothing_off():
    fair_queue = FairQueue()
    fair_queue.start("a", 10)
    fair_queue.start("a", 1000)
    fair_queue.dropped("a", 1000)
    assert fair_queue.start("a", 1) == 10


def test_clients_who_are_done_are_forgotten():
    fair_queue = FairQueue()
    for number in range(1000):
        fair_queue.begun(fair_queue.start(f"client {number}", 1) + 1)
    assert len(fair_queue._ends) <= 1

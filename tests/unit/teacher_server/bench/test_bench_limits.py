"""The sentence on what limits, from times that are given; and the times, from metrics as text."""

import pytest

from teacher_server.bench.measure import Measurement
from teacher_server.bench.report import limit, line
from teacher_server.bench.server_times import ServerTimes, parse_metrics
from teacher_server.metrics import Metrics


def row(concurrency, *, wall=10.0, seconds=1.0, inside=0.9, waiting=0.0, model=5.0, others=0):
    """Ten requests of 100 tokens each, which took ``seconds`` and were ``inside`` the server."""
    times = ServerTimes(
        requests=10 + others, inside=inside * (10 + others), sequences=10, waiting=waiting * 10,
        model=model,
    )  # fmt: skip
    return Measurement("score", concurrency, wall, [seconds] * 10, 1000, 1, 0, "", times)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (
            [row(1), row(16, inside=0.3)],
            "the network or this client limits at 16 at once: 0.700 of",
        ),
        ([row(16, model=9.0, waiting=0.6)], "the model limits at 16 at once: it computes 90% of"),
        ([row(16, model=2.0, waiting=0.6)], "queueing limits at 16 at once: a request waits 0.600"),
        ([row(1), row(4, model=3.0)], "the server's own work limits at 4 at once: the model comp"),
        ([row(1), row(4, model=0.0)], "the model limits at 4 at once: fewer at once bring as many"),
        ([row(1), row(4, wall=4.0, model=1.0)], "the number of requests limits: more than 4 at"),
        (
            [row(4, others=3)],
            "others sent 3 requests meanwhile, so what limits at 4 at once is unk",
        ),
    ],
    ids=["network", "model", "queue", "server", "engine", "too few", "others"],
)
def test_one_sentence_says_what_limits(rows, said):
    assert limit(rows).startswith(said)


def test_a_server_that_shows_no_times_leaves_it_unknown():
    silent = Measurement("score", 4, 1.0, [0.1], 100, 1, 0, "", None)
    assert "shows no times of its own" in limit([silent])
    assert line(silent).split() == ["score", "4", "100", "0.100", "0.100", "-", "-", "-", "0"]


def test_times_are_read_from_our_own_metrics():
    metrics = Metrics()
    for route, seconds in (("/v1/score", 2.0), ("/v1/score", 1.0), ("/v1/generate", 64.0)):
        metrics.latency.labels(route).observe(seconds)
    metrics.queue_seconds.labels("score").observe(0.5)
    metrics.queue_seconds.labels("generate").observe(32.0)
    metrics.forward_seconds.labels("score").observe(0.25)
    # Without what an engine in this process may have left in the registry that all share.
    lines = metrics.exposition().decode().splitlines()
    text = "\n".join(line for line in lines if not line.startswith("vllm:"))
    assert parse_metrics(text, "score") == ServerTimes(2, 3.0, 1, 0.5, 0.25)
    assert parse_metrics(text, "generate") == ServerTimes(1, 64.0, 1, 32.0, 0.0)


def test_with_vllm_the_engines_own_queue_counts():
    text = (
        'vllm:request_queue_time_seconds_sum{model_name="m"} 1.5\n'
        'vllm:request_queue_time_seconds_count{model_name="m"} 3.0\n'
    )
    assert parse_metrics(text, "score") == ServerTimes(sequences=3.0, waiting=1.5)

"""The line of each minute: rates from counters, quantiles by nearest rank."""

import logging

import pytest

from teacher_server import throughput
from teacher_server.metrics import Metrics
from teacher_server.throughput import Throughput, quantile


@pytest.mark.parametrize(
    ("q", "expected"), [(0.5, 50), (0.99, 99), (1.0, 100), (0.001, 1)], ids=str
)
def test_a_quantile_is_the_nearest_rank(q, expected):
    assert quantile(range(1, 101), q) == expected


def test_of_nothing_a_quantile_is_zero():
    assert quantile([], 0.5) == 0.0


def test_rates_are_of_the_time_since_the_last_line(monkeypatch, caplog):
    now = [1000.0]
    monkeypatch.setattr(throughput.time, "monotonic", lambda: now[0])
    metrics = Metrics()
    metrics.tokens.labels("scored").inc(999)  # before the period
    told = Throughput(metrics)
    metrics.tokens.labels("scored").inc(600)
    metrics.tokens.labels("generated").inc(120)
    metrics.queued_jobs.set(3)
    told.answered(0.25)
    told.refused()
    now[0] += 60
    with caplog.at_level(logging.INFO):
        told.log()
        metrics.queued_jobs.set(0)
        told.log()
    assert caplog.messages == [
        "Last 60 s: 1 requests, 10 scored tokens/s, 2 generated tokens/s, 3 sequences waiting, "
        "p50 0.250 s, p99 0.250 s, 1 refused"
    ]

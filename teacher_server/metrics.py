"""The Prometheus metrics: requests, tokens, queue, batches, and seconds of each.

docs/how-to/operating.md says what each metric means.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, get_args

from prometheus_client import (
    REGISTRY,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    disable_created_metrics,
    generate_latest,
)

from shared.errors import ProtocolError

State = Literal["loading", "ready", "draining", "dead"]

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_LAGS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_KINDS = ("score", "generate")

disable_created_metrics()  # half of all lines, which Prometheus does not use


class Metrics:
    """The metrics of one server, in a registry of their own.

    Labels that are known in advance start at zero, because Prometheus does not see the first
    increase of a series that starts at one.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.build = Info(
            "teacher_build", "Version, backend and model, as labels.", registry=self.registry
        )
        self._state = Gauge(
            "teacher_state", "1 for the state that the server is in.", ["state"],
            registry=self.registry,
        )  # fmt: skip
        self.requests = Counter(
            "teacher_requests", "Requests answered.", ["route", "status"], registry=self.registry
        )
        self.latency = Histogram(
            "teacher_request_seconds", "Time from a request to the end of its answer.", ["route"],
            buckets=_SECONDS, registry=self.registry,
        )  # fmt: skip
        self.loop_lag = Histogram(
            "teacher_event_loop_lag_seconds",
            "How late the event loop is, looked at a hundred times a second.",
            buckets=_LAGS, registry=self.registry,
        )  # fmt: skip
        self.rejected = Counter(
            "teacher_rejected", "Requests refused.", ["reason"], registry=self.registry
        )
        self.tokens = Counter(
            "teacher_tokens", "Tokens of answered requests.", ["kind"], registry=self.registry
        )
        self.prefix_tokens = Counter(
            "teacher_prefix_tokens",
            "Tokens of sequences and prompts, read from a prefix cache (hit) or computed (miss).",
            ["kind", "result"], registry=self.registry,
        )  # fmt: skip
        self.shared = Counter(
            "teacher_shared_answers",
            "Sequences and completions answered with those of an equal one that was under way.",
            registry=self.registry,
        )
        self.queued_tokens = Gauge(
            "teacher_queued_tokens", "Tokens admitted and not yet answered.", registry=self.registry
        )
        self.max_queued_tokens = Gauge(
            "teacher_max_queued_tokens", "Most of them, --max-queued-tokens.",
            registry=self.registry,
        )  # fmt: skip
        self.queued_jobs = Gauge(
            "teacher_queued_jobs", "Sequences admitted and not yet answered.",
            registry=self.registry,
        )  # fmt: skip
        self.held_bytes = Gauge(
            "teacher_held_bytes", "Of bodies, and of answers until they are sent.",
            registry=self.registry,
        )  # fmt: skip
        self.max_held_bytes = Gauge(
            "teacher_max_held_bytes", "Most of them, --max-held-mib.", registry=self.registry
        )
        self.queue_seconds = Histogram(
            "teacher_queue_seconds", "Time that a sequence waited for its batch.", ["kind"],
            buckets=_SECONDS, registry=self.registry,
        )  # fmt: skip
        self.batch_size = Histogram(
            "teacher_batch_size", "Sequences in a model batch.", ["kind"],
            buckets=_SIZES, registry=self.registry,
        )  # fmt: skip
        self.batch_tokens = Counter(
            "teacher_batch_tokens", "Tokens given to the model, padding included.", ["kind"],
            registry=self.registry,
        )  # fmt: skip
        self.forward_seconds = Histogram(
            "teacher_model_seconds", "Time of a model batch.", ["kind"],
            buckets=_SECONDS, registry=self.registry,
        )  # fmt: skip
        self.out_of_memory = Counter(
            "teacher_out_of_memory",
            "Batches that did not fit the model's memory; of several sequences, they are split.",
            ["kind"], registry=self.registry,
        )  # fmt: skip
        for kind in _KINDS:
            for metric in (self.queue_seconds, self.batch_size, self.batch_tokens,
                           self.forward_seconds, self.out_of_memory):  # fmt: skip
                metric.labels(kind)
            for result in ("hit", "miss"):
                self.prefix_tokens.labels(kind, result)
        for kind in ("prompt", "scored", "generated"):
            self.tokens.labels(kind)
        for error in ProtocolError.__subclasses__():
            self.rejected.labels(error.slug())

    def show_state(self, state: Callable[[], State]) -> None:
        """Read the state from ``state`` at each scrape."""
        for name in get_args(State):
            self._state.labels(name).set_function(partial(_is, state, name))

    def batch_observer(self, kind: str) -> Callable[[Sequence[float], int], None]:
        """Return a function that records (seconds each job waited, padded tokens) of a batch."""

        def observe(waited: Sequence[float], padded_tokens: int) -> None:
            self.batch_size.labels(kind).observe(len(waited))
            self.batch_tokens.labels(kind).inc(padded_tokens)
            for seconds in waited:
                self.queue_seconds.labels(kind).observe(seconds)

        return observe

    def count_prefix(self, kind: str, tokens: int, cached: int) -> None:
        """Count the tokens of a sequence to score or a prompt to complete.

        Args:
            kind: "score" or "generate".
            cached: those that a prefix cache held.
        """
        self.prefix_tokens.labels(kind, "hit").inc(cached)
        self.prefix_tokens.labels(kind, "miss").inc(tokens - cached)

    def exposition(self) -> bytes:
        """Return all metrics in Prometheus' text format.

        The default registry follows the server's own: the process, and vLLM's engine.
        """
        return generate_latest(self.registry) + generate_latest(REGISTRY)


def _is(state: Callable[[], State], name: State) -> float:
    return float(state() == name)

"""What Prometheus can ask: requests, tokens, queue, batches and time in the model."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """All metrics of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.engine_registry: CollectorRegistry | None = None  # an engine's own metrics, if any
        self.requests = Counter(
            "teacher_requests", "Requests answered.", ["route", "status"], registry=self.registry
        )
        self.latency = Histogram(
            "teacher_request_seconds", "Time from request to answer.", ["route"],
            buckets=_SECONDS, registry=self.registry,
        )  # fmt: skip
        self.rejected = Counter(
            "teacher_rejected", "Requests refused.", ["reason"], registry=self.registry
        )
        self.tokens = Counter(
            "teacher_tokens", "Tokens by kind: prompt, scored, generated.", ["kind"],
            registry=self.registry,
        )  # fmt: skip
        self.queued_tokens = Gauge(
            "teacher_queued_tokens", "Tokens admitted and not yet answered.", registry=self.registry
        )
        self.queued_jobs = Gauge(
            "teacher_queued_jobs", "Sequences admitted and not yet answered.",
            registry=self.registry,
        )  # fmt: skip
        self.held_bytes = Gauge(
            "teacher_held_bytes", "Of bodies, and of answers until they are sent.",
            registry=self.registry,
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

    def batch_observer(self, kind: str) -> Callable[[int, int], None]:
        """A function that is told (sequences, padded tokens) of each batch."""

        def observe(jobs: int, padded_tokens: int) -> None:
            self.batch_size.labels(kind).observe(jobs)
            self.batch_tokens.labels(kind).inc(padded_tokens)

        return observe

    def exposition(self) -> bytes:
        """Prometheus text format."""
        own = generate_latest(self.registry)
        return own if self.engine_registry is None else own + generate_latest(self.engine_registry)

"""Sum up what the server does in one log line a minute, where a line a request would bury it."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # `bench` takes `quantile` from here, and has no prometheus_client
    from teacher_server.metrics import Metrics

logger = logging.getLogger(__name__)

_PERIOD = 60.0


class Throughput:
    """The work since the last line: requests, their seconds, and the tokens that metrics count.

    Args:
        metrics: counts tokens, and knows how many sequences wait.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._begin()

    def answered(self, seconds: float) -> None:
        """Count a request that was answered ``seconds`` after it came."""
        self._seconds.append(seconds)

    def refused(self) -> None:
        """Count a request that was answered by an error."""
        self._refused += 1

    def log(self) -> None:
        """Log one line about the time since the last one; nothing where no request came."""
        elapsed = max(time.monotonic() - self._since, 1e-3)
        waiting = int(self._value("teacher_queued_jobs"))
        if self._seconds or self._refused or waiting:
            ordered = sorted(self._seconds)
            facts = {
                "period_seconds": round(elapsed, 1),
                "requests": len(ordered),
                "scored_tokens_per_second": round(
                    (self._tokens("scored") - self._scored) / elapsed
                ),
                "generated_tokens_per_second": round(
                    (self._tokens("generated") - self._generated) / elapsed
                ),
                "waiting": waiting,
                "p50_seconds": quantile(ordered, 0.5),
                "p99_seconds": quantile(ordered, 0.99),
                "refused": self._refused,
            }
            logger.info(
                "Last %.0f s: %d requests, %d scored tokens/s, %d generated tokens/s, "
                "%d sequences waiting, p50 %.3f s, p99 %.3f s, %d refused",
                *facts.values(), extra=facts,
            )  # fmt: skip
        self._begin()

    async def log_each_minute(self) -> None:
        """Log a line each minute, until cancelled."""
        while True:
            await asyncio.sleep(_PERIOD)
            self.log()

    def _begin(self) -> None:
        self._since = time.monotonic()
        self._seconds: list[float] = []
        self._refused = 0
        self._scored = self._tokens("scored")
        self._generated = self._tokens("generated")

    def _tokens(self, kind: str) -> float:
        return self._value("teacher_tokens_total", kind=kind)

    def _value(self, name: str, **labels: str) -> float:
        return self._metrics.registry.get_sample_value(name, labels) or 0.0


def quantile(ordered: Sequence[float], q: float) -> float:
    """Return the q-quantile of sorted values by nearest rank, 0 where there are none."""
    return ordered[max(0, math.ceil(q * len(ordered)) - 1)] if ordered else 0.0

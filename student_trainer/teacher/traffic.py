"""The counter of what a teacher has sent."""

from __future__ import annotations

import threading


class Traffic:
    """A counter of received bytes and scored tokens; safe in several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._bytes_received = 0
        self._tokens_scored = 0

    def count_bytes(self, count: int) -> None:
        with self._lock:
            self._bytes_received += count

    def count_scored(self, tokens: int) -> None:
        with self._lock:
            self._tokens_scored += tokens

    def take(self) -> tuple[int, int]:
        """Return (bytes received, completion tokens scored) since the last call."""
        with self._lock:
            taken = self._bytes_received, self._tokens_scored
            self._bytes_received = self._tokens_scored = 0
        return taken

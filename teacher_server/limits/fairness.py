"""Whose job is next: clients share the model evenly, however much each of them sends."""

from __future__ import annotations

# What a sequence counts at least: a tiny one has its own costs beside its tokens.
LEAST_JOB_TOKENS = 16


class FairClock:
    """Gives each job a start on a clock that counts tokens; the least start is next.

    A client's jobs start where its last one ends, clients side by side: what a client queues puts
    its own next job off, and nobody else's. One that had nothing queued starts now, and saves no
    time up.

    Args:
        least: what a job counts at least.

    Source: Goyal, Vin and Cheng, Start-time Fair Queuing, SIGCOMM 1996.
    """

    def __init__(self, least: int = 1) -> None:
        self._least = least
        self._now = 0
        self._ends: dict[str, int] = {}  # of each client's last job; those before now are left out

    def start(self, client: str, tokens: int) -> int:
        """The start of a job that ``client`` queues."""
        start = max(self._now, self._ends.get(client, 0))
        self._ends[client] = start + max(tokens, self._least)
        return start

    def begun(self, start: int) -> None:
        """A job with this start runs: it is that late."""
        if start > self._now:
            self._now = start
            self._ends = {client: end for client, end in self._ends.items() if end > start}

    def dropped(self, client: str, tokens: int) -> None:
        """A queued job will not run, and its client is not to wait for it."""
        if client in self._ends:
            self._ends[client] -= max(tokens, self._least)

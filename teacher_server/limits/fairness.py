"""Order jobs so that clients share the model evenly, however much each of them sends."""

from __future__ import annotations

# The least tokens that a sequence counts, because a tiny one has costs beside its tokens.
LEAST_JOB_TOKENS = 16


class FairQueue:
    """A fair queue that gives each job a start, counted in tokens; the least start is next.

    Each client has its own clock: its job starts where its last one ended, so what it queues delays
    its own jobs and nobody else's. An idle client starts now, without credit for having been idle.

    Args:
        least: the least tokens that a job counts.

    Source: Goyal, Vin and Cheng, Start-time Fair Queuing, SIGCOMM 1996.
    """

    def __init__(self, least: int = 1) -> None:
        self._least = least
        self._now = 0
        self._ends: dict[str, int] = {}  # end of each client's last job, if it is after now

    def start(self, client: str, tokens: int) -> int:
        """Queue a job of ``client``, and return its start."""
        start = max(self._now, self._ends.get(client, 0))
        self._ends[client] = start + max(tokens, self._least)
        return start

    def begun(self, start: int) -> None:
        """Move the time forward to the start of a job that runs now."""
        if start > self._now:
            self._now = start
            self._ends = {client: end for client, end in self._ends.items() if end > start}

    def dropped(self, client: str, tokens: int) -> None:
        """Remove a queued job that will not run, so that its client does not wait for it."""
        if client in self._ends:
            self._ends[client] -= max(tokens, self._least)

"""Measure the seconds of each activity for the log, and write a trace of chosen steps.

The trace is in Chrome's format, for https://ui.perfetto.dev or chrome://tracing.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Activities of the main thread, in the order of their lanes; "step" is a whole step.
ACTIVITIES = ("step", "generating", "syncing", "teacher", "forward_backward", "optimizer")
_LANES = {name: lane for lane, name in enumerate(ACTIVITIES)}
_TITLES = {"teacher": "waiting for the teacher", "forward_backward": "forward and backward"}
_REQUESTS = len(ACTIVITIES)  # the first lane of requests in flight


class Trace:
    """A JSON file of complete events that is valid after each of them, even if a run is cut.

    Args:
        path: of the file.
        steps: (first, last) optimizer step to trace, counted from 1 as in the log. What began
            within them is written.
    """

    def __init__(self, path: Path, steps: tuple[int, int]) -> None:
        self._first, self._last = steps
        self._lock = threading.Lock()
        self._lanes: set[int] = set()  # of requests in flight
        self._named: set[int] = set()
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        self._end = os.pwrite(self._file, b'{"traceEvents":[', 0)
        self._separator = b"\n"
        os.pwrite(self._file, b"]}", self._end)

    def covers(self, step: int) -> bool:
        """Return whether what begins in ``step`` is traced."""
        return self._first <= step <= self._last

    def activity(self, name: str, since: float, until: float, details: dict[str, Any]) -> None:
        """Write an activity that lasted between two times of `time.perf_counter`."""
        title = _TITLES.get(name, name)
        self._event(title, _LANES[name], title, since, until, details)

    def request(self, answer: Future[Any], since: float, details: dict[str, Any]) -> None:
        """Write a request that is in flight until ``answer`` is there."""
        with self._lock:
            lane = next(n for n in range(len(self._lanes) + 1) if n not in self._lanes)
            self._lanes.add(lane)

        def done(answer: Future[Any]) -> None:
            with self._lock:
                self._lanes.remove(lane)
            now = time.perf_counter()
            title = f"request in flight {lane + 1}"
            self._event(title, _REQUESTS + lane, "request", since, now, details)

        answer.add_done_callback(done)

    def _event(
        self, title: str, lane: int, name: str, since: float, until: float, details: dict[str, Any]
    ) -> None:
        place = {"pid": 0, "tid": lane}
        with self._lock:
            if lane not in self._named:
                self._named.add(lane)
                for kind, value in (("name", title), ("sort_index", lane)):
                    about = {"ph": "M", "name": f"thread_{kind}", "args": {kind: value}}
                    self._append({**about, **place})
            microseconds = {"ts": since * 1e6, "dur": (until - since) * 1e6}
            self._append({"ph": "X", "name": name, **place, **microseconds, "args": details})

    def _append(self, event: dict[str, Any]) -> None:
        text = self._separator + json.dumps(event).encode()
        self._separator = b",\n"
        os.pwrite(self._file, text + b"]}", self._end)  # in one write, so never half an event
        self._end += len(text)


@dataclass
class _Activity:
    name: str
    details: dict[str, Any]
    since: float
    inside: float = 0.0  # seconds of other activities


class Timeline:
    """The activities of the main thread, one inside another, with the seconds of each.

    The outer one's seconds stop while the inner one goes on, so that all of them add up to the time
    of the steps.

    Args:
        add_seconds: is called with the name and the seconds of each activity.
        trace: where chosen steps are written, if anywhere.
    """

    def __init__(
        self,
        add_seconds: Callable[[str, float], None] = lambda name, seconds: None,
        trace: Trace | None = None,
    ) -> None:
        self._add_seconds = add_seconds
        self._trace = trace
        self._step = 0
        self._open: list[_Activity] = []

    def begin_step(self, step: int) -> None:
        """Begin a step, counted from 1, and forget one that an error ended."""
        self._open.clear()
        self._step = step
        self.begin("step", step=step)

    def end_step(self) -> None:
        while self._open:
            self.end()

    def begin(self, name: str, **details: Any) -> None:
        self._open.append(_Activity(name, details, time.perf_counter()))

    def end(self) -> None:
        """End the activity that began last."""
        until = time.perf_counter()
        ended = self._open.pop()
        seconds = until - ended.since
        self._add_seconds(ended.name, seconds - ended.inside)
        if self._open:
            self._open[-1].inside += seconds
        if self._trace is not None and self._trace.covers(self._step):
            self._trace.activity(ended.name, ended.since, until, ended.details)

    @contextmanager
    def during(self, name: str, **details: Any) -> Iterator[None]:
        self.begin(name, **details)
        try:
            yield
        finally:
            self.end()

    def request(self, answer: Future[Any], **details: Any) -> None:
        """Trace a request to the teacher that has just been made."""
        if self._trace is not None and self._trace.covers(self._step):
            self._trace.request(answer, time.perf_counter(), details)

"""Show the progress of long work: a bar in a terminal, elsewhere a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from tqdm.auto import tqdm

from shared.logs import can_move, in_json

T = TypeVar("T")

_FIRST_SECONDS = 10.0  # shorter work needs no line
_SECONDS = 30.0


def tracked(items: Iterable[T], total: int, what: str, *, show: bool = True) -> Iterator[T]:
    """Yield the items, and count them as they are taken."""
    with counted(total, what, show=show) as count:
        for item in items:
            yield item
            count(1)


@contextmanager
def counted(total: int, what: str, *, show: bool = True) -> Iterator[Callable[[int], object]]:
    """Yield a function to call with how many more of ``total`` are done."""
    if not show or in_json():
        yield lambda more: None
    elif can_move():
        with tqdm(total=total, desc=what, leave=False) as bar:
            yield bar.update
    else:
        yield _Lines(total, what).add


class _Lines:
    """A report in lines: the first after ten seconds, then one in thirty, and the last."""

    def __init__(self, total: int, what: str) -> None:
        self._total, self._what = total, what
        self._done = 0
        self._since = time.monotonic()
        self._due = self._since + _FIRST_SECONDS
        self._written = False

    def add(self, more: int) -> None:
        self._done += more
        now = time.monotonic()
        seconds = now - self._since
        if self._done >= self._total and self._written:
            self._write(f"in {seconds:.0f} s")
        elif self._done < self._total and now >= self._due:
            self._due = now + _SECONDS
            left = seconds * (self._total - self._done) / max(1, self._done)
            self._write(f"about {left:.0f} s left")
            self._written = True

    def _write(self, rest: str) -> None:
        sys.stderr.write(f"{self._what}: {self._done} of {self._total}, {rest}\n")
        sys.stderr.flush()

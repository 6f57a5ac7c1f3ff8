"""Show a long program as stages: a heading each, one line that moves, and how it ended.

What a stage writes goes into a log, after its whole command. Its last line of progress is shown:
overwritten in a terminal, elsewhere each 30 seconds and at the end.
"""

from __future__ import annotations

import contextlib
import io
import re
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

_PROGRESS = re.compile(r"step \d+/\d+ |.*: [\d,]+ of [\d,]+, ")
_SHOWN_OF_A_FAILURE = 15  # lines of the log
_SIGN_SECONDS = 30.0  # between signs of life where there is no terminal


class Stages:
    """A count of stages, and the log of what they write.

    Args:
        log: file that everything a stage writes is added to.
    """

    def __init__(self, log: Path) -> None:
        self._total, self._done = 0, 0
        self._written = _Written(log)
        self._log = log

    def expect(self, more: int) -> None:
        """Count so many more stages that will follow."""
        self._total += more

    @contextlib.contextmanager
    def stage(self, name: str, command: str = "", purpose: str = "") -> Iterator[None]:
        """Run the block as one stage, whose standard output and errors go into the log."""
        if self._done == 0:
            print(f"Whole commands, and all that they write: {self._log}", flush=True)
        self._done += 1
        since = time.perf_counter()
        heading = f"[{self._done}/{self._total}] {name}" + (f": {purpose}" if purpose else "")
        print(f"\n{heading}", flush=True)
        if command:
            print(_cut(f"$ {command}"), flush=True)
        shown = sys.stderr.isatty()
        with tqdm(
            bar_format="  {elapsed} {desc}", disable=not shown, leave=False, dynamic_ncols=True
        ) as line:
            self._written.begin(f"{heading}\n$ {command}\n", line if shown else None)
            with (
                contextlib.nullcontext() if shown else self._signs_of_life(sys.stdout, since),
                contextlib.redirect_stdout(self._written),
                contextlib.redirect_stderr(self._written),
            ):
                yield
        print(self._progress(since), flush=True)

    @contextlib.contextmanager
    def _signs_of_life(self, output: TextIO, since: float) -> Iterator[None]:
        """Write the last line of progress now and then while the block runs."""
        done = threading.Event()

        def write() -> None:
            while not done.wait(_SIGN_SECONDS):
                print(self._progress(since), file=output, flush=True)

        thread = threading.Thread(target=write, name="signs-of-life", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def _progress(self, since: float) -> str:
        last = f" · {self._written.progress}" if self._written.progress else ""
        return f"  {time.perf_counter() - since:.0f} s{last}"

    def show_failure(self) -> None:
        """Write the end of the log to standard error."""
        lines = self._log.read_text(errors="replace").splitlines()[-_SHOWN_OF_A_FAILURE:]
        sys.stderr.write("\n".join([*lines, f"The whole log is {self._log}"]) + "\n")


def _cut(line: str) -> str:
    width = shutil.get_terminal_size((100, 24)).columns
    return line if len(line) <= width else f"{line[: width - 1]}…"


class _Written(io.TextIOBase):
    """A stream into a log, which shows the last line of progress that was written to it."""

    encoding = "utf-8"

    def __init__(self, log: Path) -> None:
        self._log = log
        self._line: tqdm[object] | None = None
        self._begun = ""  # of a line that has no end yet
        self.progress = ""

    def begin(self, heading: str, line: tqdm[object] | None) -> None:
        self._line, self.progress = line, ""
        self.write(heading)

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        with self._log.open("a", encoding="utf-8") as log:  # its folder may be emptied meanwhile
            log.write(text)
        *lines, self._begun = (self._begun + text).split("\n")
        for line in lines:
            if _PROGRESS.match(line):
                self.progress = line
                if self._line is not None:
                    self._line.set_description_str(line)
        return len(text)

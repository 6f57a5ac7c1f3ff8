"""The parts that all benchmarks share: arguments, processes, servers' memory, and the report.

A benchmark is a module of this folder with a docstring, which is its ``--help``, a function that
sets up what is measured, its cases, and a ``main`` that ends with `print_report`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

if TYPE_CHECKING:
    import psutil  # imported where it is used, so that other benchmarks run without it

Cell = str | int | float
Figure = str | int | float | bool | None
P = ParamSpec("P")
T = TypeVar("T")

_PATIENCE = 10.0
# A child imports the benchmark anew: a fork of a process with threads of torch can hang.
_SPAWN = multiprocessing.get_context("spawn")


def argument_parser(
    doc: str | None, *, quick: str, threads: int | None = None
) -> argparse.ArgumentParser:
    """Return a parser with ``--quick`` and, where a number is given, ``--threads``.

    Args:
        doc: the benchmark's docstring.
        quick: what ``--quick`` leaves out, for its help.
        threads: default of ``--threads``; 0 leaves torch's own. None: no such flag.
    """
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help=quick)
    if threads is not None:
        default = f"default {threads}" if threads else "default torch's own"
        parser.add_argument("--threads", type=int, default=threads, help=f"of torch; {default}")
    return parser


def set_threads(count: int) -> None:
    """Let torch compute with so many threads in this process; 0 leaves torch's own number."""
    import torch

    if count:
        torch.set_num_threads(count)


# Processes.


class Worker:
    """A child process that runs a function, and a pipe to it.

    The function is ``function(parent, *arguments)`` with a `Connection` that sends and receives
    anything that pickles. The child ends when the function does, when nobody holds the other end
    of the pipe, or with `stop`. What it prints goes to standard error, so that the last line of
    the benchmark's own output stays the last.

    Args:
        quiet: throw away what the child prints, errors included.
    """

    def __init__(self, function: Callable[..., None], *arguments: Any, quiet: bool = False) -> None:
        self.name = " ".join([function.__name__, *map(str, arguments)])
        self.pipe, far = _SPAWN.Pipe()
        self.process = _SPAWN.Process(target=_work, args=(quiet, function, far, arguments))
        self.process.start()
        far.close()  # so that the pipe ends with the child

    def receive(self) -> Any:
        """Return what the child sends next.

        Raises:
            RuntimeError: the child ended instead.
        """
        try:
            return self.pipe.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            code = self.process.exitcode
            raise RuntimeError(f"{self.name} ended with status {code}; out of RAM?") from None

    def ask(self, question: Any) -> Any:
        """Send a question and return the answer; errors as of `receive`."""
        self.pipe.send(question)
        return self.receive()

    def stop(self) -> None:
        """End the child by closing the pipe, and after `_PATIENCE` seconds by a kill."""
        self.pipe.close()
        self.process.join(_PATIENCE)
        self.process.kill()
        self.process.join()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def _work(
    quiet: bool, function: Callable[..., None], parent: Connection, arguments: Sequence[Any]
) -> None:
    if quiet:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    with contextlib.suppress(EOFError, BrokenPipeError):  # the benchmark has ended
        function(parent, *arguments)


def run_apart(function: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
    """Return the function's result from a process of its own, which gives its memory back."""
    with ProcessPoolExecutor(1, mp_context=_SPAWN) as pool:
        return pool.submit(function, *arguments, **options).result()


# Memory of servers.


def listener(url: str) -> psutil.Process:
    """Return the child of this process that listens at ``url``.

    Raises:
        RuntimeError: there is none.
    """
    import psutil

    port = int(url.rsplit(":", 1)[1])
    for child in psutil.Process().children():
        for connection in child.net_connections(kind="tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port:
                return child
    raise RuntimeError(f"no child process listens on port {port}")


def resident_bytes(process: psutil.Process) -> int:
    """Return the resident memory of a server and of all processes that it started."""
    family = [process, *process.children(recursive=True)]
    return sum(int(member.memory_info().rss) for member in family)


# The report.


def format_table(columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """Align text: the first column to the left, all others to the right; 3 digits of floats.

    Raises:
        ValueError: a row with another number of cells than there are columns.
    """
    for row in rows:
        if len(row) != len(columns):
            raise ValueError(f"the row {list(row)} has {len(row)} cells for {len(columns)} columns")
    texts = [list(columns)] + [[_text(cell) for cell in row] for row in rows]
    widths = [max(len(line[column]) for line in texts) for column in range(len(columns))]
    lines = [
        "  ".join(
            [line[0].ljust(widths[0])]
            + [text.rjust(width) for text, width in zip(line[1:], widths[1:], strict=True)]
        ).rstrip()
        for line in texts
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def print_report(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[Cell]],
    figures: Mapping[str, Figure],
    *,
    notes: Sequence[str] = (),
) -> None:
    """Print title, table and notes; then ``figures`` as one line of JSON, which is the last line.

    Raises:
        ValueError: a figure is NaN or infinite, which JSON cannot say.
    """
    last = json.dumps(dict(figures), allow_nan=False)
    print(f"{title}\n\n{format_table(columns, rows)}\n")
    for note in notes:
        print(note)
    print(last, flush=True)


def _text(cell: Cell) -> str:
    return f"{cell:.3f}" if isinstance(cell, float) else str(cell)

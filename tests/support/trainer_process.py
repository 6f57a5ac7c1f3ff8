"""A trainer in a process of its own, which can be killed at a chosen moment."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

from student_trainer.commands.main import main
from student_trainer.runtime.threads import end_process
from tests.support import forked
from tests.support.http import until
from tests.support.server import free_port
from tests.support.weights import different_weights

Moment = tuple[str, str]  # an event of Python's audit, and how its first argument ends


@contextlib.contextmanager
def running(
    argv: Sequence[str],
    *,
    killed_at: Moment | None = None,
    by: signal.Signals = signal.SIGKILL,
    **environment: str,
) -> Iterator[BaseProcess]:
    """Run ``student-trainer`` with these arguments, and kill it at the end if it still runs.

    Args:
        killed_at: the process sends itself a signal just before that.
        by: the signal.
    """
    process = forked.CONTEXT.Process(target=_run, args=(list(argv), killed_at, by, environment))
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def _run(
    argv: list[str], killed_at: Moment | None, by: signal.Signals, environment: dict[str, str]
) -> None:
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in background shells
    if killed_at is not None:
        event, ending = killed_at

        def hook(name: str, arguments: tuple[object, ...]) -> None:
            if name == event and str(arguments[0]).endswith(ending):
                os.kill(os.getpid(), by)

        sys.addaudithook(hook)
    end_process(main(argv))


def until_logged(live: Path, steps: int, seconds: float = 300) -> None:
    """Wait until a run has logged so many steps in its live log."""
    until(lambda: live.exists() and len(live.read_text().splitlines()) >= steps, seconds)


def checkpoints(output: Path) -> list[int]:
    """Return the steps of the checkpoints in a folder, in order."""
    return sorted(int(path.name.split("-")[1]) for path in output.glob("checkpoint-*"))


def assert_same_weights(a: Path, b: Path, file: str = "model.safetensors") -> None:
    """Assert that two models, or adapters, are equal to the last bit, NaNs included."""
    assert different_weights(a, b, file) == []


@contextlib.contextmanager
def two_ranks(argv: Sequence[str]) -> Iterator[tuple[BaseProcess, BaseProcess]]:
    """Run two processes that train together, as a launcher would start them."""
    one, two = _ranks()
    with running(argv, **one) as first, running(argv, **two) as second:
        yield first, second


def train(argv: Sequence[str]) -> None:
    """Run ``student-trainer`` to its end; its output is shown when it fails."""
    _succeed(forked.run(main, argv))


def train_on_two_ranks(argv: Sequence[str]) -> None:
    """Run two processes that train together to their end; their output is shown on failure."""
    environments = [{**os.environ, **own} for own in _ranks()]
    _succeed(forked.run(main, argv, argv, environments=environments))


def _succeed(done: Sequence[subprocess.CompletedProcess[str]]) -> None:
    said = "\n".join(process.stdout + process.stderr for process in done)
    assert [process.returncode for process in done] == [0] * len(done), said


def _ranks() -> list[dict[str, str]]:
    shared = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    return [{"RANK": rank, "LOCAL_RANK": rank, **shared} for rank in "01"]

"""A trainer in a process of its own, which can be killed at a chosen moment."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from safetensors.torch import load_file

from student_trainer.commands.main import main
from student_trainer.runtime.threads import end_process
from tests.support.server import free_port

# All are forked from one process that has imported torch, since the import outlasts a run.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["student_trainer.training.recipe"])

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
    process = _CONTEXT.Process(target=_run, args=(list(argv), killed_at, by, environment))
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


def checkpoints(output: Path) -> list[int]:
    """Return the steps of the checkpoints in a folder, in order."""
    return sorted(int(path.name.split("-")[1]) for path in output.glob("checkpoint-*"))


def assert_same_weights(a: Path, b: Path) -> None:
    """Assert that two models are equal to the last bit, NaNs included."""
    one, two = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert torch.equal(value.view(torch.uint8), two[name].view(torch.uint8)), name


@contextlib.contextmanager
def two_ranks(argv: Sequence[str]) -> Iterator[tuple[BaseProcess, BaseProcess]]:
    """Run two processes that train together, as a launcher would start them."""
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with (
        running(argv, RANK="0", LOCAL_RANK="0", **shared) as first,
        running(argv, RANK="1", LOCAL_RANK="1", **shared) as second,
    ):
        yield first, second

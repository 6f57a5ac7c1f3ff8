"""Processes that are forked from one that has imported both packages.

The imports take ten seconds and most tests less, so they are done once. The command lines
themselves are run by the tests that are about them, and by those of `tests/docs`.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest import mock

from student_trainer.runtime.threads import end_process

METHOD = "forkserver"  # of `multiprocessing` and of `torch.multiprocessing`
CONTEXT = multiprocessing.get_context(METHOD)
PRELOADED = "tests.support.preloaded"
CONTEXT.set_forkserver_preload([PRELOADED])
PRELOADED_VLLM = "tests.support.preloaded_vllm"

Main = Callable[[Sequence[str]], int]


class Forked:
    """A running process with the methods of `subprocess.Popen` that tests use."""

    def __init__(self, process: BaseProcess) -> None:
        self._process = process
        self.pid = int(process.pid or 0)

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        code = self._process.exitcode
        if code is None:
            raise subprocess.TimeoutExpired(["a forked process"], timeout or 0.0)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def start(
    main: Main,
    argv: Sequence[str],
    output: Path,
    errors: Path | None = None,
    *,
    environment: Mapping[str, str] | None = None,
    preloaded: str = PRELOADED,
) -> Forked:
    """Start ``main(argv)`` in a process whose standard output goes to a file.

    Args:
        main: a function that a module names; it returns the exit code.
        errors: the file of standard error; None for that of the output.
        environment: all of the process's variables; None for those of this process.
        preloaded: the module that the process has imported.
    """
    variables = dict(os.environ if environment is None else environment)
    process = CONTEXT.Process(  # type: ignore[attr-defined]
        target=_run,
        args=(main, [str(word) for word in argv], output, errors, variables, Path.cwd()),
    )
    if preloaded == PRELOADED:
        process.start()
    else:  # multiprocessing has one server, so another one's method is put in its place
        connect = _server(preloaded).connect_to_new_process
        with mock.patch.object(forkserver, "connect_to_new_process", connect):
            process.start()
    return Forked(process)


@functools.cache
def _server(preloaded: str) -> forkserver.ForkServer:
    server = forkserver.ForkServer()
    server.set_forkserver_preload([preloaded])
    return server


def run(
    main: Main, *argvs: Sequence[str], environments: Sequence[Mapping[str, str]] | None = None
) -> list[subprocess.CompletedProcess[str]]:
    """Run ``main`` in a process for each list of arguments, all at once, and wait for them."""
    environments = environments or [os.environ] * len(argvs)
    with tempfile.TemporaryDirectory() as folder:
        files = [(Path(folder) / f"{i}.out", Path(folder) / f"{i}.err") for i in range(len(argvs))]
        started = []
        try:
            for argv, (out, err), variables in zip(argvs, files, environments, strict=True):
                started.append(start(main, argv, out, err, environment=variables))
            codes = [process.wait(300) for process in started]
        finally:
            for process in started:
                process.kill()
        return [
            subprocess.CompletedProcess(list(argv), code, out.read_text(), err.read_text())
            for argv, code, (out, err) in zip(argvs, codes, files, strict=True)
        ]


def _run(
    main: Main,
    argv: list[str],
    output: Path,
    errors: Path | None,
    environment: dict[str, str],
    folder: Path,
) -> None:
    os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
    os.dup2(1 if errors is None else os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = [main.__module__, *argv]
    try:
        code = main(argv)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    sys.stdout.flush()
    sys.stderr.flush()
    end_process(code)

"""Running model-written Python without trusting it.

A program runs in one process and its tests in another (`_harness.py`), forked from a clean
interpreter; arguments and results cross a pipe as plain data. The tests' process gives the
verdict, and the program's has nothing to forge it with: no secret, no test, no object they touch.
`os._exit(0)`, patched builtins or modules, forged output and searched memory prove nothing, and an
object whose `__eq__` is always true is refused where HumanEval's own harness lets it pass. Lists,
dicts and sets that are changed in place are changed for the tests too.

Both processes have a session and an empty working directory of their own, an empty environment, and
limits of CPU time, wall time, memory, open files and written bytes (none). An audit hook ends them
at the first socket, subprocess, fork, signal, file write, or read outside the standard library.
Where the kernel has Landlock (Linux 5.13) and network namespaces it holds the same fence below the
interpreter, and what escapes its session is found and killed.

This protects against what language models write, by accident or by imitation. It is no defence
against somebody with an exploit for the interpreter or the kernel: use a virtual machine for that.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, Self

from tqdm.auto import tqdm

from shared.logs import in_json

Outcome = Literal["passed", "failed", "timeout", "memory", "forbidden", "crashed"]

_HARNESS = Path(__file__).with_name("_harness.py")


@dataclass(frozen=True)
class Program:
    """What is run.

    Attributes:
        code: source that defines the function under test.
        entry_point: its name.
        test: source that defines ``check(candidate)``, HumanEval's convention.
        context: trusted source that the test may use, such as helpers in the prompt.
    """

    code: str
    entry_point: str
    test: str
    context: str = ""


_PROBE = Program("def f():\n    return 1\n", "f", "def check(f):\n    assert f() == 1\n")


@dataclass(frozen=True)
class SandboxResult:
    """How a program ended, why, and after how many seconds."""

    outcome: Outcome
    detail: str
    seconds: float

    @property
    def passed(self) -> bool:
        return self.outcome == "passed"


class Sandbox:
    """One fork server; use as a context manager, from one thread at a time.

    Args:
        timeout: seconds of wall time for each program.
        memory_bytes: address space of each program.

    Raises:
        RuntimeError: not even a trivial program passes, so the limits do not suit this machine.
    """

    def __init__(self, *, timeout: float = 5.0, memory_bytes: int = 512 << 20) -> None:
        self.timeout = timeout
        self.memory_bytes = memory_bytes
        self._folder = tempfile.TemporaryDirectory(prefix="sandbox-")
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(_HARNESS)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=self._folder.name,
            env={"PYTHONHASHSEED": "0"},
            text=True,
        )
        # A machine on which nothing can run would otherwise read as a model that solves nothing.
        probe = self.run(_PROBE)
        if not probe.passed:
            self.close()
            raise RuntimeError(
                f"the sandbox cannot run programs here: {probe.outcome} {probe.detail}"
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()
        self._folder.cleanup()

    def run(self, program: Program) -> SandboxResult:
        """Run one program to its end or its limits.

        Raises:
            RuntimeError: the fork server itself is gone.
        """
        request = {
            **asdict(program),
            "timeout": self.timeout,
            "memory_bytes": self.memory_bytes,
        }
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the sandbox ended with status {self._process.wait()}")
        return SandboxResult(**json.loads(line))


def run_programs(
    programs: Sequence[Program],
    *,
    timeout: float = 5.0,
    memory_bytes: int = 512 << 20,
    workers: int | None = None,
    progress: bool = False,
) -> list[SandboxResult]:
    """Results in order, ``workers`` programs at a time (default: one for each core)."""
    count = min(workers or os.cpu_count() or 1, len(programs))
    if not count:
        return []
    with contextlib.ExitStack() as stack:
        idle: queue.SimpleQueue[Sandbox] = queue.SimpleQueue()
        for _ in range(count):
            idle.put(stack.enter_context(Sandbox(timeout=timeout, memory_bytes=memory_bytes)))
        threads = stack.enter_context(ThreadPoolExecutor(count))

        def run(program: Program) -> SandboxResult:
            with _borrowed(idle) as sandbox:
                return sandbox.run(program)

        results = threads.map(run, programs)
        hidden = not progress or in_json()
        return list(tqdm(results, "Checking", len(programs), disable=hidden, leave=False))


@contextlib.contextmanager
def _borrowed(idle: queue.SimpleQueue[Sandbox]) -> Iterator[Sandbox]:
    sandbox = idle.get()
    try:
        yield sandbox
    finally:
        idle.put(sandbox)

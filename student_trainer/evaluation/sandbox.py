"""Run model-written Python without trusting it.

A program runs in one process and its tests in another (`_harness.py`), both forked from an
interpreter that has seen no code and no test; arguments and results cross a pipe as plain data. The
tests' process gives the verdict, and the program's process has nothing to forge it with: no secret,
no test, no object they touch. `os._exit(0)`, patched builtins or modules, forged output and
searched memory prove nothing, and an object whose `__eq__` is always true is refused where
HumanEval's own harness lets it pass. Lists, dicts and sets that are changed in place are changed
for the tests too.

A *fence* is a restriction that the kernel enforces (`_fences.py`): a seccomp filter that allows by
list (no process, thread, socket, pipe or file can be made, none but the process itself be signalled
or changed), Landlock (no file is read but Python's and the shared libraries), no capabilities,
`no_new_privs`, and limits of CPU time, wall time, memory and open files. A machine that refuses one
of these runs no program, unless ``unsafe`` is set. Where they are allowed, namespaces (network,
IPC, process, mount, host name, cgroup) and a user id of its own come on top. An audit hook reports
what a program tried and ends it; the verdict gets clearer, and no safety rests on it.

Strings have the same hash in every run, so a program that depends on the order of a set has the
same verdict in every run.

This is no defence against somebody with an exploit for the kernel: use a virtual machine for that.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, Self

from shared.errors import ConfigurationError
from student_trainer.runtime.progress import tracked

Outcome = Literal["passed", "failed", "timeout", "memory", "forbidden", "crashed"]

logger = logging.getLogger(__name__)

_HARNESS = Path(__file__).with_name("_harness.py")
# Without site-packages, the user's folders and the script's; -I would ignore the hash seed too.
_PYTHON = (sys.executable, "-S", "-s", "-P")


@dataclass(frozen=True)
class Program:
    """A program to run, and its tests.

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


# Needs 8 MiB, because the interpreter has less than that free whatever the limit.
_PROBE = Program(
    "def f():\n    return len(bytes(8 << 20))\n", "f", "def check(f):\n    assert f() == 8 << 20\n"
)


@dataclass(frozen=True)
class SandboxResult:
    """The outcome of a program, its reason, and its time in seconds."""

    outcome: Outcome
    detail: str
    seconds: float

    @property
    def passed(self) -> bool:
        return self.outcome == "passed"


class Sandbox:
    """A process that runs programs; use as a context manager, from one thread at a time.

    Args:
        timeout: seconds of wall time for each program.
        memory_bytes: address space of each program.
        unsafe: run programs also where the kernel refuses a fence.

    Attributes:
        held: names of the fences that hold.
        missing: names of the required fences that do not; empty unless ``unsafe``.

    Raises:
        ConfigurationError: the kernel refuses a fence; the error names it and the remedy.
        RuntimeError: not even a trivial program passes, so the limits do not suit this machine.
    """

    def __init__(
        self, *, timeout: float = 5.0, memory_bytes: int = 512 << 20, unsafe: bool = False
    ) -> None:
        self.timeout = timeout
        self.memory_bytes = memory_bytes
        arguments = [str(timeout), str(memory_bytes), *(["unsafe"] if unsafe else [])]
        self._process = subprocess.Popen(
            [*_PYTHON, str(_HARNESS), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd="/",
            env={"PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1"},
            text=True,
        )
        assert self._process.stdout is not None
        state = json.loads(self._process.stdout.readline() or '{"held": [], "missing": ["any"]}')
        self.held: tuple[str, ...] = tuple(state["held"])
        self.missing: tuple[str, ...] = tuple(state["missing"])
        if self.missing and not unsafe:
            self.close()
            raise ConfigurationError(
                f"this machine has no {', '.join(self.missing)}, so model-written programs cannot "
                "be fenced in: take Linux 5.13 or newer on x86_64 or aarch64 with Landlock on "
                "(lsm=landlock), in a container one whose seccomp profile lets it through, or run "
                "them with your own rights by --unsafe_sandbox True"
            )
        # Probed, because a machine that can run nothing would look like a model that solves
        # nothing.
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

    def run(self, program: Program) -> SandboxResult:
        """Run one program to its end or its limits.

        Raises:
            RuntimeError: the fork server itself is gone.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(asdict(program)) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the sandbox ended with status {self._process.wait()}")
        return SandboxResult(**json.loads(line))


def check_sandbox(*, unsafe: bool) -> list[str]:
    """Warn of the fences that are missing here, and return them.

    Raises:
        ConfigurationError: there are some, and ``unsafe`` is not set.
    """
    with Sandbox(unsafe=unsafe) as sandbox:
        missing = list(sandbox.missing)
    if missing:
        logger.warning(
            "UNSAFE: model-written programs run without %s; they can reach your files, network "
            "and processes, and forge their verdicts (--unsafe_sandbox)",
            ", ".join(missing),
        )
    return missing


def run_programs(
    programs: Sequence[Program],
    *,
    timeout: float = 5.0,
    memory_bytes: int = 512 << 20,
    workers: int | None = None,
    progress: bool = False,
    unsafe: bool = False,
) -> list[SandboxResult]:
    """Run programs, ``workers`` at a time (default: one for each core); return results in order.

    Raises:
        ConfigurationError: a fence is missing and ``unsafe`` is not set, as `Sandbox` says.
    """
    count = min(workers or os.cpu_count() or 1, len(programs))
    if not count:
        return []
    with contextlib.ExitStack() as stack:
        idle: queue.SimpleQueue[Sandbox] = queue.SimpleQueue()
        for _ in range(count):
            one = Sandbox(timeout=timeout, memory_bytes=memory_bytes, unsafe=unsafe)
            idle.put(stack.enter_context(one))
        threads = stack.enter_context(ThreadPoolExecutor(count))

        def run(program: Program) -> SandboxResult:
            with _borrowed(idle) as sandbox:
                return sandbox.run(program)

        results = threads.map(run, programs)
        return list(tracked(results, len(programs), "Checking", show=progress))


@contextlib.contextmanager
def _borrowed(idle: queue.SimpleQueue[Sandbox]) -> Iterator[Sandbox]:
    sandbox = idle.get()
    try:
        yield sandbox
    finally:
        idle.put(sandbox)

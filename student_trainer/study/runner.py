"""Run the jobs of a study, and skip those that an earlier run has finished."""

from __future__ import annotations

import contextlib
import fcntl
import json
import multiprocessing
import os
import re
import runpy
import shlex
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from shared.errors import CellFailedError, ConfigurationError
from shared.yaml_file import flag_arguments
from student_trainer.runtime.signals import signals_as_exits
from student_trainer.study.plan import Job, Plan
from student_trainer.study.served import served, servers_for
from student_trainer.study.spec import TRAINER_COMMANDS

MARKER = ".study"
# All cells are forked from one process that has imported torch and transformers, because the
# imports take as long as some cells.
_CONTEXT = multiprocessing.get_context("forkserver")
_PRELOAD = [
    "student_trainer.training.recipe",
    "student_trainer.commands.run_evaluation",
    "student_trainer.model.load",
]
_FOLDER = re.compile(r"\{([^{}]*)\}")


class Runner:
    """A runner of jobs in order; only the teachers of one job are served at a time.

    Args:
        folder: everything is written below it.
        serve: flags of `teacher-server serve`.
        say: takes a line of progress.
    """

    def __init__(self, folder: Path, serve: Sequence[str], say: Callable[[str], None]) -> None:
        self.folder = folder
        self._serve = serve
        self._say = say
        self._servers = contextlib.ExitStack()
        self._served: tuple[tuple[str, str], ...] = ()
        self._addresses: list[str] = []

    def state(self, job: Job) -> str:
        """Return `done`, `changed` (made by another command or from other inputs) or `to do`."""
        made = self._marker(job)
        if made is None or not self._output(job.folder).exists():
            return "to do"
        return "done" if made["digest"] == job.digest else "changed"

    def seconds(self, job: Job) -> float | None:
        """Return how long the job took when it ran, or None if it has not run."""
        made = self._marker(job)
        return None if made is None else float(made["seconds"])

    def command(self, job: Job) -> str:
        """Return the job's command line, with a stand-in for the address of a teacher."""
        stand_ins = [
            f"{name}=http://TEACHER" if name else "http://TEACHER" for name, _ in job.teachers
        ]
        return _typed(job, self._argv(job, stand_ins))

    def run(self, jobs: Sequence[Job], dropping: Plan | None = None) -> None:
        """Run the jobs that are not done, and again their inputs whose weights were deleted.

        Args:
            dropping: all jobs of the study, where weights are deleted once nobody needs them.

        Raises:
            ConfigurationError: the folder holds other files, or another study runs in it.
            CellFailedError: a command failed, or did not write what the next one needs.
            TeacherUnreachableError: a teacher did not start.
        """
        with self._locked(jobs):
            left = self._left(jobs)
            progress = _Progress(len(left), self._say)
            for job in jobs:
                if job not in left and (seconds := self.seconds(job)) is not None:
                    progress.learn(job, seconds)
            if any(job.cell.command in TRAINER_COMMANDS for job in left):
                _CONTEXT.set_forkserver_preload(_PRELOAD)
            try:
                while left:
                    job = self._next(left)
                    left.remove(job)
                    needed = {other.teachers for other in [job, *left]}
                    if self._served not in needed:
                        self._stop_serving()
                    seconds = self._run(job)
                    progress.done(job, seconds, left)
                    if dropping is not None:
                        self._drop_weights(dropping, left)
            finally:
                self._stop_serving()

    def _left(self, jobs: Sequence[Job]) -> list[Job]:
        """Return the jobs to run, in order, and before them what lost its weights."""
        left: list[Job] = []
        needed: set[str] = set()
        for job in reversed(jobs):  # users come before their inputs
            dropped = (self._marker(job) or {}).get("dropped", False)
            if self.state(job) != "done" or (dropped and job.folder in needed):
                left.insert(0, job)
                needed.add(job.folder)
            if job.folder in needed:
                needed.update(job.inputs)
        return left

    def _drop_weights(self, plan: Plan, left: Sequence[Job]) -> None:
        """Delete the weights of the models from which nothing is left to be made."""
        waiting = {job.folder for job in left}
        for job in plan.jobs.values():
            users = plan.users(job.folder)
            made = self._marker(job)
            if not users or made is None or made.get("dropped") or job.folder in waiting:
                continue
            if any(u.folder in waiting or self.state(u) != "done" for u in users):
                continue
            folder = self._output(job.folder)
            if folder.is_symlink():  # a link leads to weights that are not the study's
                continue
            for file in folder.rglob("*.safetensors"):
                made["dropped"] = True
                file.unlink()
            if made.get("dropped"):
                self._write_marker(job, made)

    def _next(self, left: Sequence[Job]) -> Job:
        """Return a job whose inputs are there, if possible one that needs no other teacher."""
        waiting = {job.folder for job in left}
        ready = [job for job in left if not waiting.intersection(job.inputs)]
        seed = ready[0].seed
        for job in ready:
            if job.seed == seed and job.teachers in ((), self._served):
                return job
        return ready[0]

    def _run(self, job: Job) -> float:
        output = self._output(job.folder)
        self._marker_path(job).unlink(missing_ok=True)
        if output.exists():  # of an interrupted or an outdated run
            shutil.rmtree(output)
        output.parent.mkdir(parents=True, exist_ok=True)
        since = time.perf_counter()
        if job.teachers:
            self._keep_serving(job.teachers)
        argv = self._argv(job, self._addresses)
        log = output.with_name(output.name + ".log")
        code = _in_a_process(job.cell.command, argv, log)
        if code != 0:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
            raise CellFailedError(
                f"{job.folder} ended with {code}:\n$ {_typed(job, argv)}\n{tail}\n"
                f"The whole log is {log}"
            )
        if not output.exists():
            raise CellFailedError(
                f"{job.folder} wrote nothing into its --output_dir {output}; the log is {log}"
            )
        seconds = time.perf_counter() - since
        made = {"digest": job.digest, "seconds": round(seconds, 2), "command": _typed(job, argv)}
        self._write_marker(job, made)
        return seconds

    def _write_marker(self, job: Job, made: dict[str, Any]) -> None:
        marker = self._marker_path(job)
        unfinished = marker.with_name(marker.name + ".new")
        unfinished.write_text(json.dumps(made, indent=2) + "\n")
        unfinished.replace(marker)

    def _argv(self, job: Job, addresses: Sequence[str]) -> list[str]:
        argv = [_FOLDER.sub(lambda f: str(self._output(f[1])), argument) for argument in job.argv]
        if job.teachers:
            argv += flag_arguments("teacher_url", addresses if len(addresses) > 1 else addresses[0])
        return [*argv, f"--output_dir={self._output(job.folder)}"]

    def _keep_serving(self, teachers: tuple[tuple[str, str], ...]) -> None:
        if self._served == teachers:
            return
        self._stop_serving()
        for server in servers_for([(name, self._output(folder)) for name, folder in teachers]):
            log = server.first.with_name(server.first.name + ".server.log")
            flags = [*server.flags(), *self._serve]
            url, command = self._servers.enter_context(served(server.model, flags, log))
            self._addresses += server.addresses(url)
            self._say(f"$ {command}")
        self._served = teachers

    def _stop_serving(self) -> None:
        self._served, self._addresses = (), []
        self._servers.close()

    @contextlib.contextmanager
    def _locked(self, jobs: Sequence[Job]) -> Iterator[None]:
        """Lock the folder's seeds, which two studies would overwrite; other seeds stay free."""
        used = self.folder.exists() and any(self.folder.iterdir())
        if used and not (self.folder / MARKER).exists():
            raise ConfigurationError(
                f"--output_dir {self.folder} holds files that are not of a study; "
                "give an empty or new folder"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / MARKER).touch()
        with contextlib.ExitStack() as locks:
            for part in sorted({job.folder.split("/")[0] for job in jobs}):
                file = locks.enter_context((self.folder / f".{part}.lock").open("w"))
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError as error:
                    raise ConfigurationError(
                        f"--output_dir {self.folder}: another study runs {part} there"
                    ) from error
            yield

    def _output(self, folder: str) -> Path:
        return self.folder / folder

    def _marker_path(self, job: Job) -> Path:
        output = self._output(job.folder)
        return output.with_name(output.name + ".done.json")

    def _marker(self, job: Job) -> dict[str, Any] | None:
        path = self._marker_path(job)
        return json.loads(path.read_text()) if path.exists() else None


class _Progress:
    """A report of one line a cell, with the time left by cells of the same command."""

    def __init__(self, count: int, say: Callable[[str], None]) -> None:
        self._count = count
        self._say = say
        self._since = time.perf_counter()
        self._finished = 0
        self._seconds: dict[str, list[float]] = {}

    def learn(self, job: Job, seconds: float) -> None:
        self._seconds.setdefault(job.cell.command, []).append(seconds)

    def done(self, job: Job, seconds: float, left: Sequence[Job]) -> None:
        self.learn(job, seconds)
        self._finished += 1
        elapsed = time.perf_counter() - self._since
        self._say(
            f"[{self._finished}/{self._count}] {job.folder}: {seconds:.0f} s; "
            f"{_duration(elapsed)} elapsed, about {_duration(self._remaining(left))} left"
        )

    def _remaining(self, left: Sequence[Job]) -> float:
        known = {name: sum(s) / len(s) for name, s in self._seconds.items()}
        usual = sum(known.values()) / len(known)
        return sum(known.get(job.cell.command, usual) for job in left)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _typed(job: Job, argv: Sequence[str]) -> str:
    command = job.cell.command
    program = ["student-trainer"] if command in TRAINER_COMMANDS else ["python", "-m"]
    return shlex.join([*program, command, *argv])


def _in_a_process(command: str, argv: Sequence[str], log: Path) -> int:
    """Run a command in a process that does not outlive this one; return its exit code."""
    process = _CONTEXT.Process(target=_execute, args=(command, list(argv), str(log)))
    process.start()
    try:
        process.join()
    finally:
        if process.is_alive():
            process.terminate()
            process.join(20)
        if process.is_alive():
            process.kill()
            process.join()
    assert process.exitcode is not None
    return process.exitcode


def _execute(command: str, argv: list[str], log: str) -> None:
    """Run a command in the new process, with standard output and errors in the log."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with Path(log).open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if command in TRAINER_COMMANDS:
        sys.argv = ["student-trainer", command, *argv]
        with signals_as_exits():  # a cell that is told to end has failed, and will run again
            runpy.run_module("student_trainer", run_name="__main__", alter_sys=True)
        return
    sys.argv = [command, *argv]
    runpy.run_module(command, run_name="__main__", alter_sys=True)


def _end_with_parent() -> None:
    """End this process with its parent, so that a killed study leaves no cell running."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)

"""Run teacher servers as processes, for as long as they are needed."""

from __future__ import annotations

import contextlib
import json
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from shared.errors import TeacherUnreachableError


@dataclass(frozen=True)
class Server:
    """A server to start: a model, and those of its adapters that are teachers.

    Attributes:
        model: folder or name of the model; of adapters, their base.
        teachers: names and folders of the teachers, of which a plain model has one. The only
            teacher of a run may have an empty name.
        adapters: whether the teachers are adapters of ``model``.
    """

    model: Path
    teachers: tuple[tuple[str, Path], ...]
    adapters: bool

    @property
    def first(self) -> Path:
        """The folder of the first teacher, beside which the server's log is written."""
        return self.teachers[0][1]

    def flags(self) -> list[str]:
        """Return the flags that serve the adapters, each under the name that requests call."""
        if not self.adapters:
            return []
        return [
            "--lora-modules",
            *(f"{name or folder.name}={folder}" for name, folder in self.teachers),
        ]

    def addresses(self, url: str) -> list[str]:
        """Return the values of ``--teacher_url`` for the teachers of this server at ``url``."""
        if not self.adapters:
            return [f"{name}={url}" if name else url for name, _ in self.teachers]
        return [
            f"{name}={url}" if name else f"{url}#{folder.name}" for name, folder in self.teachers
        ]


def servers_for(teachers: Sequence[tuple[str, Path]]) -> list[Server]:
    """Return the servers of named teachers: one for each model, and one for adapters of one base.

    Servers come in the order of their first teachers.
    """
    adapters: dict[str, list[tuple[str, Path]]] = {}
    servers: list[Server | str] = []  # a base stands for its server until all adapters are known
    for name, folder in teachers:
        base = _base_of(folder)
        if base is None:
            servers.append(Server(folder, ((name, folder),), adapters=False))
            continue
        if base not in adapters:
            servers.append(base)
        adapters.setdefault(base, []).append((name, folder))
    return [
        Server(Path(one), tuple(adapters[one]), adapters=True) if isinstance(one, str) else one
        for one in servers
    ]


def _base_of(folder: Path) -> str | None:
    """Return the base model that an adapter's folder names, or None for a model of its own."""
    file = folder / "adapter_config.json"
    if not file.exists():
        return None
    return str(json.loads(file.read_text())["base_model_name_or_path"])


@contextlib.contextmanager
def served(model: Path, flags: Sequence[str], log: Path) -> Iterator[tuple[str, str]]:
    """Start `teacher-server` on a free port, yield (address, command) when ready, and stop it.

    Raises:
        TeacherUnreachableError: the server ended instead of becoming ready; holds its log.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    argv = ["serve", str(model), "--port", str(port), *flags]
    with log.open("w") as output:
        server = subprocess.Popen(
            [sys.executable, "-m", "teacher_server", *argv],
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            url = f"http://127.0.0.1:{port}"
            _wait_until_ready(server, url, log)
            yield url, shlex.join(["teacher-server", *argv])
        finally:
            server.terminate()
            try:
                server.wait(timeout=20)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def _wait_until_ready(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    # Imported here, so that the flags of `study` are answered without numpy and httpx.
    from student_trainer.teacher.http import HttpClient
    from student_trainer.teacher.sparse_gkd import SERVER

    with contextlib.closing(HttpClient(SERVER, seconds=10.0)) as http:
        while True:
            if server.poll() is not None:
                raise TeacherUnreachableError(
                    f"the teacher server ended with {server.returncode}:\n{log.read_text()}"
                )
            if not http.why_not_ready(url):
                return
            time.sleep(0.2)

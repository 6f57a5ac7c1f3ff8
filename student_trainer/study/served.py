"""Run a teacher server as a process, for as long as it is needed."""

from __future__ import annotations

import contextlib
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from shared.errors import TeacherUnreachableError


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

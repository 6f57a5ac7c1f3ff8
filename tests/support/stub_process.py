"""A teacher without a model in a process of its own, which can be killed, stopped and restarted.

``python -m tests.support.stub_process PORT INFO SECONDS``: INFO is a file with an `InfoResponse`.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx

from shared import wire
from shared.protocol import InfoResponse
from tests.support import stub
from tests.support.http import until
from tests.support.paced import PacedTeacher


def start(port: int, info: InfoResponse, folder: Path, seconds: float = 0.0) -> subprocess.Popen[bytes]:
    """A process that answers at ``port``, each request after ``seconds``; not yet ready.

    Scores depend on the tokens alone, so that those of another process are the same.
    """
    file = folder / f"info-{port}.json"
    file.write_bytes(wire.dump(info, wire.JSON_MEDIA_TYPE))
    return subprocess.Popen([sys.executable, "-m", __name__, str(port), str(file), str(seconds)])


def answers(port: int) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(f"http://127.0.0.1:{port}/ready").status_code == 200
    return False


@contextlib.contextmanager
def running(
    port: int, info: InfoResponse, folder: Path, seconds: float = 0.0
) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is ready; killed at the end."""
    process = start(port, info, folder, seconds)
    try:
        until(lambda: answers(port), 30)
        yield process
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    port, file, seconds = int(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
    told = wire.load(InfoResponse, file.read_bytes(), wire.JSON_MEDIA_TYPE, max_bytes=1 << 20)
    with stub.serving(PacedTeacher(told, lambda tokens: seconds, one_at_a_time=False), port):
        threading.Event().wait()

"""A teacher without a model in a process of its own, which tests can kill and restart."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx

from shared import wire
from shared.protocol import InfoResponse
from tests.support import stub
from tests.support.http import until
from tests.support.paced import PacedTeacher

LOCAL = "127.0.0.1"


def start(
    port: int,
    info: InfoResponse,
    folder: Path,
    seconds: float = 0.0,
    *,
    host: str = LOCAL,
    launcher: Sequence[str] = (),
) -> subprocess.Popen[bytes]:
    """Start a process that answers at ``port``, each request after ``seconds``.

    Scores depend on the tokens alone, so that those of another process are the same.
    """
    file = folder / f"info-{port}.json"
    file.write_bytes(wire.dump(info, wire.JSON_MEDIA_TYPE))
    arguments = [host, str(port), str(file), str(seconds)]
    return subprocess.Popen([*launcher, sys.executable, "-m", __name__, *arguments])


def answers(port: int, host: str = LOCAL) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(f"http://{host}:{port}/ready", timeout=1.0).status_code == 200
    return False


@contextlib.contextmanager
def running(
    port: int,
    info: InfoResponse,
    folder: Path,
    seconds: float = 0.0,
    *,
    host: str = LOCAL,
    launcher: Sequence[str] = (),
) -> Iterator[subprocess.Popen[bytes]]:
    """Yield a process that is ready, and kill it at the end."""
    process = start(port, info, folder, seconds, host=host, launcher=launcher)
    try:
        until(lambda: answers(port, host))
        yield process
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    host, port, file, seconds = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), float(sys.argv[4])
    served = wire.load(InfoResponse, file.read_bytes(), wire.JSON_MEDIA_TYPE, max_bytes=1 << 20)
    paced = PacedTeacher(served, lambda tokens: seconds, one_at_a_time=False)
    with stub.serving(paced, port, host=host):
        threading.Event().wait()

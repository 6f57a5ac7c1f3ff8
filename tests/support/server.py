"""A real teacher server in a process of its own."""

from __future__ import annotations

import contextlib
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import torch
import uvicorn

from teacher_server.app import TeacherApp
from teacher_server.cli import main
from teacher_server.http.protocol import GuardedProtocol
from tests.support import forked

Process = subprocess.Popen[bytes] | forked.Forked


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_server(
    model: Path,
    *arguments: str,
    port: int,
    log: Path,
    launcher: Sequence[str] = (),
    command_line: bool = False,
    **environment: str,
) -> Process:
    """Start a server whose output goes to ``log``, and return its process before it is ready.

    Its backend is transformers, unless the arguments choose another.

    Args:
        command_line: run the command itself, as it is with a launcher and on a GPU; else fork the
            server, and a vLLM engine from it, from a process that has imported both.
    """
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment}
    argv = ["serve", str(model), "--port", str(port), "--backend", "transformers", *arguments]
    if not (launcher or command_line or ("vllm" in arguments and torch.cuda.is_available())):
        preloaded = forked.PRELOADED_VLLM if "vllm" in arguments else forked.PRELOADED
        return forked.start(main, argv, log, environment=environment, preloaded=preloaded)
    with log.open("wb") as output:
        return subprocess.Popen(
            [*launcher, sys.executable, "-m", "teacher_server", *argv],
            stdout=output, stderr=subprocess.STDOUT, env=environment,
        )  # fmt: skip


def wait_until_ready(server: Process, url: str, log: Path, route: str = "/ready") -> None:
    deadline = time.monotonic() + 540  # less than a test may take
    while time.monotonic() < deadline:
        if server.poll() is not None:
            break
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(url + route).status_code == 200:
                return
        time.sleep(0.1)
    raise AssertionError(f"the server is not ready (exit {server.poll()}):\n{log.read_text()}")


@dataclass(frozen=True)
class Running:
    """A ready server: its process, the address it listens at, and the file of its log."""

    process: Process
    url: str
    log: Path


@contextlib.contextmanager
def server_running(
    model: Path, *arguments: str, launcher: Sequence[str] = (), command_line: bool = False
) -> Iterator[Running]:
    """Yield a ready server, whose log is shown when the test inside fails."""
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "server.log"
        server = start_server(
            model, *arguments, port=port, log=log, launcher=launcher, command_line=command_line
        )
        with _until_the_end(server, f"http://127.0.0.1:{port}", log, "/ready") as url:
            yield Running(server, url, log)


@contextlib.contextmanager
def running_server(
    model: Path, *arguments: str, launcher: Sequence[str] = (), command_line: bool = False
) -> Iterator[str]:
    """Yield the URL of a ready server, whose log is shown when the test inside fails."""
    with server_running(model, *arguments, launcher=launcher, command_line=command_line) as server:
        yield server.url


@contextlib.contextmanager
def serving(app: TeacherApp) -> Iterator[str]:
    """Yield the URL of an application in this process, on a real socket."""
    port = free_port()
    server = uvicorn.Server(
        uvicorn.Config(app.api, port=port, http=GuardedProtocol, lifespan="off",
                       log_level="critical", timeout_graceful_shutdown=1)
    )  # fmt: skip
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


def stock_vllm(argv: Sequence[str]) -> int:
    """Run what the module of vLLM's own server runs."""
    from vllm.entrypoints.openai import api_server

    runpy.run_path(str(api_server.__file__), run_name="__main__")
    return 0


@contextlib.contextmanager
def running_stock_vllm(model: Path, *arguments: str, command_line: bool = False) -> Iterator[str]:
    """Yield the URL of vLLM's own server, whose log is shown when the test inside fails."""
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "server.log"
        server = _start_stock_vllm(model, *arguments, port=port, log=log, command_line=command_line)
        with _until_the_end(server, f"http://127.0.0.1:{port}", log, "/health") as url:
            yield url


@contextlib.contextmanager
def running_rollout_server(
    model: Path, *, port: int, log: Path, lora_rank: int | None = None
) -> Iterator[Process]:
    """Yield the process of vLLM's own server that takes weights over gloo, and adapters if told."""
    lora = [] if lora_rank is None else ["--enable-lora", "--max-lora-rank", str(lora_rank)]
    server = _start_stock_vllm(
        model, "--tokens-only", "--weight-transfer-config", '{"backend": "gloo"}',
        "--worker-extension-cls", "shared.vllm_adapters.ReceivedAdapters",
        "--max-model-len", "256", *lora,
        port=port, log=log, VLLM_SERVER_DEV_MODE="1",
        VLLM_ALLOW_RUNTIME_LORA_UPDATING="0" if lora_rank is None else "1",
    )  # fmt: skip
    with _until_the_end(server, f"http://127.0.0.1:{port}", log, "/health"):
        yield server


def _start_stock_vllm(
    model: Path,
    *arguments: str,
    port: int,
    log: Path,
    command_line: bool = False,
    **environment: str,
) -> Process:
    environment = {
        **os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1",
        "TORCH_COMPILE_DISABLE": "1",  # it would compile one small function for ten seconds
        **environment,
    }  # fmt: skip
    argv = [
        "--model", str(model), "--host", "127.0.0.1", "--port", str(port),
        "--dtype", "float32", "--enforce-eager", *arguments,
    ]  # fmt: skip
    if not command_line:
        return forked.start(
            stock_vllm, argv, log, environment=environment, preloaded=forked.PRELOADED_VLLM
        )
    # What `vllm serve` runs; in the CPU build that command does not find its package.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *argv]
    with log.open("wb") as output:
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)


@contextlib.contextmanager
def _until_the_end(server: Process, url: str, log: Path, ready: str) -> Iterator[str]:
    try:
        wait_until_ready(server, url, log, ready)
        yield url
    except BaseException:
        sys.stderr.write(log.read_text())
        raise
    finally:
        # An engine is killed at once: vLLM waits five seconds for its end, and then kills it.
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in psutil.Process(server.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    if process.name().startswith("VLLM::"):
                        process.kill()
        server.terminate()
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()

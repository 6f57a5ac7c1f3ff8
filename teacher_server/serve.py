"""Serve a model: listen, load it, answer until a signal, drain."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import multiprocessing
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

import uvicorn

from shared import logs
from shared.errors import ConfigurationError
from teacher_server.app import TeacherApp
from teacher_server.backends.base import Backend
from teacher_server.http.event_loop import limit_log_lines, survive_full_tables, watch_lag
from teacher_server.http.protocol import GuardedProtocol, raise_descriptor_limit
from teacher_server.limits.auth import ApiKeys
from teacher_server.metrics import Metrics
from teacher_server.settings import Settings

logger = logging.getLogger("teacher_server")

# Connections that the kernel keeps until they are accepted.
_WAITING_CONNECTIONS = 1024


def listen(settings: Settings) -> socket.socket:
    """Return the listening socket, taken before the model loads.

    Raises:
        ConfigurationError: the port is in use, or the address is not this machine's.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
        listener.listen(_WAITING_CONNECTIONS)
    except OSError as error:
        listener.close()
        raise ConfigurationError(
            f"cannot listen on {settings.host} port {settings.port}: {error.strerror}. "
            "Choose another --port, or stop what uses it"
        ) from error
    return listener


class _Server(uvicorn.Server):
    """A uvicorn server that drains on SIGTERM and SIGINT and then ends with exit code 0."""

    def __init__(self, config: uvicorn.Config, app: TeacherApp) -> None:
        super().__init__(config)
        self.teacher_app = app
        self._draining: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listener in sockets or ():  # asyncio has set the backlog to that of `uvicorn.Config`
            listener.listen(_WAITING_CONNECTIONS)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._drain, number)
        yield

    def _drain(self, number: signal.Signals) -> None:
        if self._draining is not None:  # a second signal ends the server at once
            self.handle_exit(number, None)
            return
        logger.info("%s: finishing what runs, taking nothing new", number.name)
        self._draining = asyncio.create_task(self._finish(number))

    async def _finish(self, number: signal.Signals) -> None:
        """Keep listening until all admitted requests are answered; new ones are refused."""
        patience = self.teacher_app.settings.drain_timeout
        since = time.monotonic()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience):
                await self.teacher_app.admission.drain()
        # The rest of the time is for answers that are still being sent.
        remaining = patience - (time.monotonic() - since)
        self.config.timeout_graceful_shutdown = max(1, round(remaining))
        self.handle_exit(number, None)


async def serve(settings: Settings, keys: ApiKeys, listener: socket.socket) -> int:
    """Answer at ``listener`` until a signal, and return the command's exit code."""
    raise_descriptor_limit()
    app = TeacherApp(settings, Metrics(), keys)
    server = _Server(
        uvicorn.Config(
            app.api,
            log_level="warning",
            log_config=None,  # uvicorn's lines then have our format
            access_log=False,  # our own access log has the request's id
            lifespan="off",
            http=GuardedProtocol,  # on h11, as httptools sets no limit to headers
            ws="none",
            # asyncio accepts this many connections before it serves the first of them.
            backlog=max(1, min(256, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 32)),
            # Longer than clients keep idle connections, so that none is closed under a request.
            timeout_keep_alive=75,
            timeout_graceful_shutdown=max(1, round(settings.drain_timeout)),
            ssl_certfile=settings.ssl_certfile,
            ssl_keyfile=settings.ssl_keyfile,
        ),
        app,
    )
    host, port = listener.getsockname()[:2]
    scheme = "https" if settings.ssl_certfile else "http"
    url = f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"
    logger.info("Listening on %s; loading %s", url, settings.model)
    if not settings.loopback and not keys:
        logger.warning("--allow-unauthenticated: everyone who reaches this port may use it")
    if not settings.loopback and scheme == "http":
        logger.warning("Keys and tokens travel unencrypted; --ssl-certfile encrypts them")
    # Threads that work on bodies then give the interpreter back to the event loop soon.
    sys.setswitchinterval(0.001)
    limit_log_lines()
    survive_full_tables(asyncio.get_running_loop())
    loading = asyncio.create_task(_load(app, settings, server, next_steps(settings, url, keys)))
    watching = asyncio.create_task(watch_lag(app.metrics.loop_lag.observe))
    summing_up = asyncio.create_task(app.throughput.log_each_minute())
    await server.serve(sockets=[listener])
    watching.cancel()
    summing_up.cancel()
    app.throughput.log()  # of the minute that has begun
    if app.backend is not None:
        await app.backend.close()
    if not loading.done():
        # A normal end would wait for the loading thread, which nothing can interrupt.
        for engine in multiprocessing.active_children():
            engine.terminate()
        logging.shutdown()
        os._exit(0)
    return loading.result()


async def _load(app: TeacherApp, settings: Settings, server: _Server, hints: list[str]) -> int:
    """Load the model while the socket already answers; return the exit code, 0 for success.

    ``hints`` are logged once the model is loaded, for people alone.
    """
    try:
        loop = asyncio.get_running_loop()
        backend = await asyncio.to_thread(make_backend, settings, app.metrics, loop)
    except ConfigurationError as error:
        server.should_exit = True
        logs.log_failure("teacher-server", str(error))
        return 2
    except Exception as error:
        logger.exception("The model failed to load")
        server.should_exit = True
        logs.log_failure("teacher-server", str(error))
        return 1
    # The objects that exist now stay, and each search of them for garbage takes 0.3 s.
    await asyncio.to_thread(gc.collect)
    gc.freeze()
    app.ready(backend)
    logger.info("Ready: %s", backend.facts.teacher)
    for hint in [] if logs.in_json() else hints:
        logger.info("%s", hint)
    return 0


def next_steps(settings: Settings, url: str, keys: ApiKeys) -> list[str]:
    """Return the lines that say what to do with a server that is ready; none holds a key."""
    if (wildcard := urlsplit(url).hostname) in ("0.0.0.0", "::"):
        name = socket.gethostname()  # other machines find this one by it, if by anything
        url = url.replace(f"[{wildcard}]" if ":" in wildcard else wildcard, name)
    export = ["Key:      export TEACHER_API_KEY=…, one of this server's keys, for what follows"]
    header = '-H "Authorization: Bearer $TEACHER_API_KEY" ' if keys else ""
    model = f"#{settings.adapters[0].name}" if settings.adapters else ""
    told = "each request has a line, each minute one of throughput"
    if not settings.log_requests:
        told = "a line of throughput each minute with requests; --log-requests: a line each request"
    return [
        *(export if keys else []),
        f"Train:    student-trainer distill --teacher_url {url}{model} "
        "--model_name_or_path STUDENT --dataset_name ROWS.jsonl --output_dir out",
        f"Ask:      curl {header}{url}/v1/info",
        f"Measure:  teacher-server bench {url}",
        f"This log: {told}",
    ]


def make_backend(settings: Settings, metrics: Metrics, loop: asyncio.AbstractEventLoop) -> Backend:
    # Imported here, so that --help and wrong flags do not wait for torch or vllm.
    why = " (--backend auto)" if settings.backend == "auto" else ""
    logger.info("Backend: %s%s", settings.engine, why)
    if settings.engine == "vllm":
        from teacher_server.backends.vllm import VllmBackend

        logs.adopt("transformers", "huggingface_hub")
        return VllmBackend(settings, metrics, loop)
    from teacher_server.backends.transformers import TransformersBackend

    logs.adopt("transformers", "huggingface_hub")
    return TransformersBackend(settings, metrics)

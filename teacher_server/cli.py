"""The program `teacher-server COMMAND`, also as `python -m teacher_server`.

Exit codes: 0 stopped on request, 1 the model failed, 2 wrong flags, model or port.
"""

from __future__ import annotations

import argparse
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
from collections.abc import Iterator, Sequence
from typing import Any, get_args

import uvicorn

from shared import __version__, logs
from shared.errors import ConfigurationError
from shared.shell_completion import SHELLS, CommandArguments, arguments_of, completion_script
from shared.yaml_file import config_path, flag_arguments, read_config
from teacher_server.app import TeacherApp
from teacher_server.backends.base import Backend
from teacher_server.http.event_loop import limit_log_lines, survive_full_tables, watch_lag
from teacher_server.http.protocol import GuardedProtocol, raise_descriptor_limit
from teacher_server.limits.auth import ENVIRONMENT, ApiKeys, load_keys
from teacher_server.metrics import Metrics
from teacher_server.orphans import end_with_parent
from teacher_server.settings import BackendName, DeviceName, DtypeName, Settings

logger = logging.getLogger("teacher_server")

end_with_parent()  # here, as both ways to start the program import this module

# Connections that the kernel keeps until they are accepted.
_WAITING_CONNECTIONS = 1024
_COMPLETION = {
    "completion": CommandArguments(
        "a script that completes flags in bash, zsh or fish", choices=SHELLS
    )
}
_EPILOG = """\
vLLM's engine flags
  After MODEL, --backend vllm takes every other flag of `vllm serve`'s engine under its own name,
  such as --tensor-parallel-size, --pipeline-parallel-size, --data-parallel-size, --quantization,
  --gpu-memory-utilization and --enable-prefix-caching. On CPU the KV cache is 1 GiB unless
  VLLM_CPU_KVCACHE_SPACE says otherwise.

Memory for scoring
  Full-vocabulary logits are the one thing vLLM does not plan for: 8,192 rows x 152,000 tokens x
  4 bytes are 4.98 GB. They are made --score-chunk-mib at a time (128 MiB are 220 such rows), so
  scoring takes about 4 times that, 0.5 GiB, of what --gpu-memory-utilization leaves free, whatever
  the batch.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser, serve = _parsers()
    try:
        arguments = _with_file(sys.argv[1:] if argv is None else argv)
    except ConfigurationError as error:
        return _fail(error, 2)
    parsed, engine_flags = parser.parse_known_args(arguments)
    if parsed.command == "completion":
        commands = {"serve": arguments_of(serve, "load a model and answer requests"), **_COMPLETION}
        sys.stdout.write(completion_script(parsed.shell, "teacher-server", commands))
        return 0
    del parsed.command, parsed.config
    values = {**vars(parsed), "engine_flags": tuple(engine_flags)}
    values["lora_modules"] = tuple(values["lora_modules"])
    logs.setup(
        values.pop("log_format"), level=values.pop("log_level"),
        text="%(asctime)s %(levelname)s %(message)s",
    )  # fmt: skip
    try:
        settings = Settings(**values)
        keys = load_keys(settings)
        listener = _listen(settings)
    except ConfigurationError as error:
        return _fail(error, 2)
    with listener:
        return asyncio.run(_serve(settings, keys, listener))


def _with_file(argv: Sequence[str]) -> list[str]:
    """Return the arguments after those of the ``--config`` file, so that the command line wins.

    Raises:
        ConfigurationError: the file cannot be read, or holds something else than flags.
    """
    path = config_path(argv)
    if path is None or argv[0] != "serve":
        return list(argv)
    flags = list(argv[1:])
    content = {str(key).replace("_", "-"): value for key, value in read_config(path).items()}
    model = content.pop("model", None)
    if not flags[0].startswith("-"):
        model = flags.pop(0)
    return [
        "serve",
        *([] if model is None else [str(model)]),
        *(argument for name, value in content.items() for argument in _flag(name, value)),
        *flags,
    ]


def _flag(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    return flag_arguments(name, value)


def _parsers() -> tuple[argparse.ArgumentParser, argparse.ArgumentParser]:
    """Return the parser of the program, and that of `serve`."""
    defaults = Settings.__dataclass_fields__
    parser = argparse.ArgumentParser(
        prog="teacher-server",
        description="A teacher behind HTTP: sparse log-probs and generations.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"teacher-server {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, dest="command")
    completion = commands.add_parser("completion", help=_COMPLETION["completion"].help)
    completion.add_argument("shell", choices=SHELLS)
    serve = commands.add_parser(
        "serve", help="load a model and answer requests", epilog=_EPILOG, allow_abbrev=False,
        usage="teacher-server serve MODEL [flags]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip

    def add(group: Any, flag: str, help: str, **options: Any) -> None:
        default = defaults[flag.removeprefix("--").replace("-", "_")].default
        group.add_argument(flag, help=f"{help} (default: {default})", default=default, **options)

    def switch(group: Any, flag: str, help: str) -> None:
        group.add_argument(flag, action=argparse.BooleanOptionalAction, default=False, help=help)

    serve.add_argument("model", help="model folder or Hugging Face Hub id")
    serve.add_argument(
        "--config", metavar="YAML", help="file with the same names as the flags, and `model`"
    )
    model = serve.add_argument_group("model")
    add(model, "--backend", "engine; auto is vllm where installed", choices=get_args(BackendName))
    add(model, "--dtype", "of the weights; auto: as stored", choices=get_args(DtypeName))
    add(model, "--device", "auto takes a GPU if there is one", choices=get_args(DeviceName))
    add(model, "--max-model-len", "longest sequence in tokens; None: the model's context", type=int)
    add(model, "--served-model-name", "name in /v1/info instead of MODEL")
    add(
        model, "--lora-modules",
        "LoRA adapters of MODEL to serve as teachers of their own, by the names that requests then "
        "give as `model`", nargs="+", metavar="NAME=DIR",
    )  # fmt: skip
    switch(model, "--trust-remote-code", "run model code of the checkpoint")

    doors = serve.add_argument_group("address, keys and certificates")
    add(doors, "--host", "address to listen on; 0.0.0.0 for other machines, which needs a key")
    add(doors, "--port", "port to listen on; 0 takes a free one", type=int)
    add(
        doors, "--api-key-file",
        f"keys of callers, one a line; # begins a comment. {ENVIRONMENT} holds more, with commas",
    )  # fmt: skip
    switch(
        doors, "--allow-unauthenticated",
        "let everyone ask who reaches --host, if that is no loopback address",
    )  # fmt: skip
    add(doors, "--ssl-certfile", "PEM certificate, with its chain, for https")
    add(doors, "--ssl-keyfile", "PEM private key; None where --ssl-certfile holds it")

    limits = serve.add_argument_group("batches and limits")
    add(
        limits, "--max-batch-tokens",
        "padded tokens of a model batch; --max-num-batched-tokens of vLLM", type=int,
    )  # fmt: skip
    add(
        limits, "--max-queued-tokens",
        "tokens admitted at once, of one client half as many; over it 429", type=int,
    )  # fmt: skip
    add(
        limits, "--max-held-mib",
        "MiB of requests and of answers being sent; over it 429", type=int,
    )  # fmt: skip
    add(limits, "--max-request-tokens", "tokens of one request", type=int)
    add(limits, "--max-request-bytes", "size of a request's body", type=int)
    add(limits, "--max-top-k", "largest top_k of a request", type=int)
    add(
        limits, "--score-chunk-mib",
        "MiB of float32 logits made at once, for 256 rows at most", type=int,
    )  # fmt: skip
    add(limits, "--request-timeout", "seconds until a request is answered 504", type=float)
    add(limits, "--drain-timeout", "seconds for what runs at shutdown", type=float)

    lines = serve.add_argument_group("logs")
    lines.add_argument(
        "--log-level", default="info", choices=["debug", "info", "warning", "error"],
        help="(default: info)",
    )  # fmt: skip
    lines.add_argument(
        "--log-format", default="text", choices=get_args(logs.LogFormat),
        help="json: an object a line, with the request's id (default: text)",
    )  # fmt: skip
    return parser, serve


def _listen(settings: Settings) -> socket.socket:
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


async def _serve(settings: Settings, keys: ApiKeys, listener: socket.socket) -> int:
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
    logger.info("Listening on %s://%s:%d; loading %s", scheme, host, port, settings.model)
    if not settings.loopback and not keys:
        logger.warning("--allow-unauthenticated: everyone who reaches this port may use it")
    if not settings.loopback and scheme == "http":
        logger.warning("Keys and tokens travel unencrypted; --ssl-certfile encrypts them")
    # Threads that work on bodies then give the interpreter back to the event loop soon.
    sys.setswitchinterval(0.001)
    limit_log_lines()
    survive_full_tables(asyncio.get_running_loop())
    loading = asyncio.create_task(_load(app, settings, server))
    watching = asyncio.create_task(watch_lag(app.metrics.loop_lag.observe))
    await server.serve(sockets=[listener])
    watching.cancel()
    if app.backend is not None:
        await app.backend.close()
    if not loading.done():
        # A normal end would wait for the loading thread, which nothing can interrupt.
        for engine in multiprocessing.active_children():
            engine.terminate()
        logging.shutdown()
        os._exit(0)
    return loading.result()


async def _load(app: TeacherApp, settings: Settings, server: _Server) -> int:
    """Load the model while the socket already answers; return the exit code, 0 for success."""
    try:
        loop = asyncio.get_running_loop()
        backend = await asyncio.to_thread(_make_backend, settings, app.metrics, loop)
    except ConfigurationError as error:
        server.should_exit = True
        return _fail(error, 2)
    except Exception as error:
        logger.exception("The model failed to load")
        server.should_exit = True
        return _fail(error, 1)
    # The objects that exist now stay, and each search of them for garbage takes 0.3 s.
    await asyncio.to_thread(gc.collect)
    gc.freeze()
    app.ready(backend)
    logger.info("Ready: %s", backend.facts.teacher)
    return 0


def _make_backend(settings: Settings, metrics: Metrics, loop: asyncio.AbstractEventLoop) -> Backend:
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


def _fail(error: Exception, code: int) -> int:
    logs.log_failure("teacher-server", str(error))
    return code

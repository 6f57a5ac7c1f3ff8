"""The program `teacher-server COMMAND`, also as `python -m teacher_server`.

Exit codes: 0 stopped on request, 1 the model failed, 2 wrong flags, model or port.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from typing import Any, get_args

from shared import __version__, logs
from shared.command_line import OneLineParser
from shared.errors import ConfigurationError
from shared.idle_threads import sleep_when_idle
from shared.shell_completion import SHELLS, CommandArguments, arguments_of, completion_script
from shared.yaml_file import config_path, flag_arguments, read_config, where_given
from teacher_server.bench import command as bench
from teacher_server.orphans import end_with_parent

end_with_parent()  # here, as both ways to start the program import this module

_COMPLETION = {
    "completion": CommandArguments(
        "a script that completes flags in bash, zsh or fish", choices=SHELLS
    )
}
# Settings that are on or off: a file may say so in any of YAML's ways.
_SWITCHES = ("trust-remote-code", "allow-unauthenticated", "log-requests")
_SERVE = "load a model and answer requests"
_EPILOG = """\
vLLM's engine flags
  After MODEL, --backend vllm takes every other flag of `vllm serve`'s engine under its own name,
  such as --tensor-parallel-size, --pipeline-parallel-size, --data-parallel-size, --quantization,
  --gpu-memory-utilization and --enable-prefix-caching. On CPU the KV cache is 1 GiB unless
  VLLM_CPU_KVCACHE_SPACE says otherwise, and nothing is compiled unless TORCH_COMPILE_DISABLE is 0.
  Prompts that begin alike are read once; --no-enable-prefix-caching turns that off.

Memory for scoring
  Full-vocabulary logits are the one thing vLLM does not plan for: 8,192 rows x 152,000 tokens x
  4 bytes are 4.98 GB. They are made --score-chunk-mib at a time (128 MiB are 220 such rows), so
  scoring takes about 4 times that, 0.5 GiB, of what --gpu-memory-utilization leaves free, whatever
  the batch.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["bench"]:  # needs nothing of the server
        return bench.main(argv[1:])
    parser, serve = _parsers()
    try:
        parsed, engine_flags = parser.parse_known_args(_with_file(argv))
    except ConfigurationError as error:
        return _fail(f"{error}{where_given(str(error), argv)}", 2)
    if parsed.command != "serve" and engine_flags:
        return _fail(f"unknown argument {engine_flags[0].split('=')[0]!r} of {parsed.command}", 2)
    if parsed.command == "completion":
        commands = {
            "serve": arguments_of(serve, _SERVE),
            "bench": arguments_of(bench.parser(), bench.HELP),
            **_COMPLETION,
        }
        sys.stdout.write(completion_script(parsed.shell, "teacher-server", commands))
        return 0
    del parsed.command, parsed.config
    values = {**vars(parsed), "engine_flags": tuple(engine_flags)}
    values["lora_modules"] = tuple(values["lora_modules"])
    logs.setup(
        values.pop("log_format"), level=values.pop("log_level"),
        text="%(asctime)s %(levelname)s %(message)s",
    )  # fmt: skip
    sleep_when_idle()
    try:
        # Imported here, so that `bench` does not wait for a web framework, nor need one.
        from teacher_server import serve as server
        from teacher_server.limits.auth import load_keys
        from teacher_server.settings import Settings

        settings = Settings(**values)
        keys = load_keys(settings)
        listener = server.listen(settings)
    except ModuleNotFoundError as error:
        return _fail(f"{error.name} is not installed; pip install 'sparse-gkd[teacher]'", 2)
    except ConfigurationError as error:
        return _fail(f"{error}{where_given(str(error), argv)}", 2)
    with listener:
        return asyncio.run(server.serve(settings, keys, listener))


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
    if name in _SWITCHES and isinstance(value, str):
        value = {"yes": True, "on": True, "no": False, "off": False}.get(value.lower(), value)
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    return flag_arguments(name, value)


def _parsers() -> tuple[argparse.ArgumentParser, argparse.ArgumentParser]:
    """Return the parser of the program, and that of `serve`."""
    from teacher_server.limits.auth import ENVIRONMENT
    from teacher_server.settings import BackendName, DeviceName, DtypeName, Settings

    defaults = Settings.__dataclass_fields__
    parser = OneLineParser(
        prog="teacher-server",
        description="A teacher behind HTTP: sparse log-probs and generations.",
    )
    parser.add_argument("--version", action="version", version=f"teacher-server {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, dest="command")
    serve = commands.add_parser(
        "serve", help=_SERVE, epilog=_EPILOG,
        usage="teacher-server serve MODEL [flags]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    bench.add_arguments(commands.add_parser("bench", help=bench.HELP))
    completion = commands.add_parser("completion", help=_COMPLETION["completion"].help)
    completion.add_argument("shell", choices=SHELLS)

    def add(group: Any, flag: str, help: str, **options: Any) -> None:
        default = defaults[flag.removeprefix("--").replace("-", "_")].default
        group.add_argument(flag, help=f"{help} (default: {default})", default=default, **options)

    def switch(group: Any, flag: str, help: str) -> None:
        group.add_argument(flag, action=argparse.BooleanOptionalAction, default=False, help=help)

    serve.add_argument("model", metavar="MODEL", help="model folder or Hugging Face Hub id")
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
    switch(
        lines, "--log-requests",
        "log a line about each request, beside the line of throughput each minute; without, those "
        "alone that failed by the server's own fault (5xx) have one",
    )  # fmt: skip
    lines.add_argument(
        "--log-level", default="info", choices=["debug", "info", "warning", "error"],
        help="(default: info)",
    )  # fmt: skip
    lines.add_argument(
        "--log-format", default="text", choices=get_args(logs.LogFormat),
        help="json: an object a line, with the request's id (default: text)",
    )  # fmt: skip
    return parser, serve


def _fail(error: Exception | str, code: int) -> int:
    logs.log_failure("teacher-server", str(error))
    return code

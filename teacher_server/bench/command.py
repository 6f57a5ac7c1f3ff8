"""The flags of `teacher-server bench URL`, and its run; nothing heavy is imported before that."""

from __future__ import annotations

import argparse
import json
import os
import secrets
import sys
from collections.abc import Sequence

from shared import logs
from shared.command_line import OneLineParser
from shared.errors import ConfigurationError

HELP = "measure a running server: tokens a second, latencies, and what limits them"
_KEY = "TEACHER_API_KEY"
_SEEDS = 2**62  # each request adds its number to the seed, and the protocol takes seeds below 2^63
_DEFAULTS: dict[str, int | list[int]] = {
    "num_prompts": 32, "max_concurrency": [1, 4, 16], "input_len": 256, "output_len": 64,
    "top_k": 64,
}  # fmt: skip
_QUICK = {
    **_DEFAULTS, "num_prompts": 8, "max_concurrency": [1, 4], "input_len": 64, "output_len": 16
}  # fmt: skip
_EPILOG = f"""\
Sequences are of random token ids of the server's vocabulary, one a request, none sent twice.
Scoring is measured as training asks for it: --output-len positions of --input-len + --output-len
tokens. Lengths that are not given are lowered to what the server takes.
What limits is told from the server's own times (/metrics) beside this client's, so measure while
nobody else uses the server. The key of a server that has keys is read from {_KEY}.
"""


def parser() -> OneLineParser:
    """Return the command's parser."""
    made = OneLineParser(prog="teacher-server bench")
    add_arguments(made)
    return made


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments; flags that `vllm bench serve` has too have its names."""
    parser.description = HELP[0].upper() + HELP[1:] + "."
    parser.epilog = _EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter

    def number(name: str, help: str, **options: int | str) -> None:
        default = " ".join(map(str, _list(_DEFAULTS[name])))
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, type=_positive, help=f"{help} (default: {default})", **options)  # type: ignore[arg-type]

    parser.add_argument("url", metavar="URL", help="address of the server: http://host:8000")
    number("num_prompts", "requests of each kind, at each concurrency")
    number("max_concurrency", "requests at once; several numbers are measured in turn", nargs="+")
    number("input_len", "tokens of a prompt")
    number("output_len", "tokens of a completion, which are scored or generated")
    parser.add_argument(
        "--top-k", type=_positive, help=f"log-probs a position (default: {_DEFAULTS['top_k']})"
    )
    parser.add_argument(
        "--kind", choices=("score", "generate", "both"), default="both", help="(default: both)"
    )
    parser.add_argument(
        "--seed", type=_seed,
        help="of the token ids (default: another each time, so that no cache holds them)",
    )  # fmt: skip
    parser.add_argument(
        "--timeout",
        type=_positive,
        default=600,
        help="seconds for one request, until its whole answer is there; one that takes longer "
        "counts as failed (default: 600)",
    )
    quick = ", ".join(
        f"--{name.replace('_', '-')} {' '.join(map(str, _list(value)))}"
        for name, value in _QUICK.items()
        if value != _DEFAULTS[name]
    )
    parser.add_argument("--quick", action="store_true", help=f"a first look: {quick}")
    parser.add_argument("--json", action="store_true", help="print one JSON object, no table")


def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit code: 2 where nothing could be measured."""
    try:
        arguments = parser().parse(argv)
    except ConfigurationError as error:
        logs.log_failure("teacher-server", str(error))
        return 2
    given = vars(arguments)
    unset = {
        name: value
        for name, value in (_QUICK if arguments.quick else _DEFAULTS).items()
        if given[name] is None
    }
    given.update(unset)
    # Imported here, so that --help waits for neither numpy nor pydantic.
    from teacher_server.bench import report
    from teacher_server.bench.connection import Address
    from teacher_server.bench.measure import Workload, measure, read_info

    try:
        key = _key()
        address = Address.parse(arguments.url, key, arguments.timeout)
        info = read_info(address)
        workload = Workload(
            arguments.num_prompts, arguments.input_len, arguments.output_len, arguments.top_k,
            secrets.randbits(32) if arguments.seed is None else arguments.seed,
        ).fitted(info, unset.keys())  # fmt: skip
        kinds = ["score", "generate"] if arguments.kind == "both" else [arguments.kind]
        if "generate" in kinds and not info.capabilities.generate:
            if arguments.kind == "generate":
                raise ConfigurationError(f"{arguments.url} generates nothing; take --kind score")
            kinds.remove("generate")
        if not arguments.json:
            sys.stdout.write(report.heading(info, workload, arguments.url))
        rows = []
        for kind in kinds:
            for concurrency in arguments.max_concurrency:
                rows.append(measure(address, info, workload, kind, concurrency))
                if not arguments.json:
                    sys.stdout.write(report.line(rows[-1]))
                    sys.stdout.flush()
    except ConfigurationError as error:
        logs.log_failure("teacher-server", str(error))
        return 2
    except KeyboardInterrupt:
        return 130
    if arguments.json:
        found = report.as_json(info, workload, arguments.url, rows)
        sys.stdout.write(json.dumps(found, indent=2) + "\n")
    else:
        sys.stdout.write(report.verdicts(rows))
    return 0


def _key() -> str | None:
    from shared.api_keys import check_key

    key = os.environ.get(_KEY)
    return check_key(key, _KEY) if key else None


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 on")
    return value


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= _SEEDS:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 0 to {_SEEDS - 1}")
    return int(text)


def _list(value: int | list[int]) -> list[int]:
    return value if isinstance(value, list) else [value]

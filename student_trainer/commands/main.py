"""The program `student-trainer COMMAND`, also as `python -m student_trainer COMMAND`.

Exit codes: 0 done, 1 the run failed (teacher lost, unusable answer), 2 wrong flags, key or data,
130 Ctrl-C, but a run that trains saves a checkpoint and ends with 0.
`docs/reference/command-line.md` has them all.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Sequence
from typing import NoReturn, get_args

from shared import __version__, logs
from shared.command_line import OneLineParser, did_you_mean
from shared.errors import (
    ConfigurationError,
    SparseGKDError,
)
from shared.idle_threads import sleep_when_idle
from shared.yaml_file import config_path, read_config, where_given
from student_trainer.config.commands import COMMANDS
from student_trainer.runtime.threads import end_process

# Of the extra `trainer`: without them, as after `pip install sparse-gkd`, only help is to be had.
_TRAINER = {
    "accelerate",
    "datasets",
    "httpx",
    "jinja2",
    "peft",
    "tenacity",
    "torch",
    "transformers",
}
_LIST = "\n".join(f"  {name.ljust(10)} {command.help}" for name, command in COMMANDS.items())
USAGE = f"""\
usage: student-trainer COMMAND [flags]

commands:
{_LIST}

student-trainer COMMAND --help lists the flags that matter. Commands from sft to merge have
--help_all, which lists those of transformers too, and --config FILE.yaml, which holds the same
names; sft, distill, precompute and study have --dry_run, which tells what a run would do.
--log_format json, with any command, makes each line that is logged a JSON object.

exit codes: 0 done, 1 failed, 2 wrong flags, key or data, 130 Ctrl-C, 143 SIGTERM; Ctrl-C or
SIGTERM while training saves a checkpoint and ends with 0, a second one ends at once."""

# Commands of other programs, and what stands for them here.
_HABITS = {
    "train": ("distill",), "gkd": ("distill",), "kd": ("distill",), "gold": ("distill",),
    "finetune": ("sft",), "fine_tune": ("sft",), "eval": ("evaluate",), "generate": ("evaluate",),
    "merge_lora": ("merge",), "export": ("merge",), "env": ("doctor",), "check": ("doctor",),
    "sweep": ("study",), "cache": ("precompute",),
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    try:
        arguments = _set_up_logs(list(sys.argv[1:] if argv is None else argv))
    except ConfigurationError as error:
        return _fail(str(error), error.exit_code)
    if not arguments or arguments[0] in ("-h", "--help"):
        _print(USAGE)
        return 0 if arguments else 2
    name = arguments[0]
    if name == "--version":
        _print(f"student-trainer {__version__}")
        return 0
    if name not in COMMANDS:
        hint = did_you_mean(name, COMMANDS, _HABITS) or f" There is {', '.join(COMMANDS)}"
        return _fail(f"unknown command {name!r}.{hint}", 2)
    sleep_when_idle()
    try:
        command = COMMANDS[name].load()
        logs.adopt("transformers", "huggingface_hub", "datasets")
        command(arguments[1:])
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except SparseGKDError as error:
        where = where_given(str(error), arguments) if error.exit_code == 2 else ""
        return _fail(f"{error}{where}", error.exit_code)
    except ImportError as error:  # a flag needs a package that is not installed
        missing = (error.name or "").split(".")[0]
        if isinstance(error, ModuleNotFoundError) and missing in _TRAINER:
            return _fail(f"{missing} is not installed; pip install 'sparse-gkd[trainer]'", 2)
        return _fail(str(error), 2)
    return 0


def program() -> NoReturn:
    """Run `main` and end the process with its exit code."""
    end_process(main())


def _set_up_logs(argv: list[str]) -> list[str]:
    """Set up logs by ``--log_format``, and return the arguments without it.

    This happens before anything large is imported, so that all messages have the format.
    """
    path = config_path(argv)
    if path is not None:
        with contextlib.suppress(ConfigurationError):  # raised again where all flags are read
            form = read_config(path).get("log_format")
            argv = argv if form is None else [f"--log_format={form}", *argv]
    parser = OneLineParser(prog="student-trainer", add_help=False)
    parser.add_argument("--log_format", choices=get_args(logs.LogFormat), default="text")
    flags, rest = parser.parse_known_args(argv)
    logs.setup(flags.log_format, level="warning", text="%(message)s")
    logging.getLogger("student_trainer").setLevel(logging.INFO)
    return rest


def _fail(message: str, code: int) -> int:
    logs.log_failure("student-trainer", message)
    return code


def _print(text: str) -> None:
    sys.stdout.write(text + "\n")

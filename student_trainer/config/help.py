"""The texts of `--help`, with the flags that matter in groups, and of `--help_all`."""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from shared.compat import parser_actions
from student_trainer.config.flags import Flag

EXIT_CODES = """\
exit codes: 0 done (also when Ctrl-C or SIGTERM ends training: a checkpoint is saved), 1 the run
failed (teacher lost, disk full, not finite), 2 wrong flags, key or data, 130 Ctrl-C, 143 SIGTERM;
the last two before training begins, or sent twice."""

# Titles in the order of `--help`; each flag names its group where it is declared.
GROUPS = (
    "model", "data", "chat template", "teacher", "method and divergence",
    "rollouts and generation", "generation", "training", "memory and speed", "LoRA",
    "evaluation and logs", "checks and results", "the command itself",
)  # fmt: skip
_COMMAND = ("config", "help", "help_all")

_INDENT = 30


def add_help(parser: argparse.ArgumentParser, flags: Mapping[str, Flag]) -> None:
    """Add ``--help`` and ``--help_all`` to a parser that was made without help."""
    groups: dict[str, list[str]] = {title: [] for title in GROUPS}
    for name, flag in flags.items():
        if flag.group is not None:
            groups[flag.group].append(name)
    groups["the command itself"] += _COMMAND
    more = "Show all flags, of transformers' Trainer too, with all that is to say of each."
    parser.add_argument(
        "-h", "--help", action=_Show, text=lambda: short_help(parser, groups),
        help="Show the flags that matter, and stop.",
    )  # fmt: skip
    parser.add_argument("--help_all", action=_Show, text=parser.format_help, help=more)
    parser.epilog = EXIT_CODES


class _Show(argparse.Action):
    """An argparse action that writes a text to standard output and exits."""

    def __init__(
        self, option_strings: list[str], dest: str, *, text: Callable[[], str], help: str
    ) -> None:
        super().__init__(option_strings, dest=dest, nargs=0, default=argparse.SUPPRESS, help=help)
        self._text = text

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        sys.stdout.write(self._text())
        parser.exit()


def actions_of(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """Return the optional arguments by name, without the ``--no_`` twins of switches."""
    flags: dict[str, argparse.Action] = {}
    for action in parser_actions(parser):
        if action.option_strings:
            flags.setdefault(action.dest, action)
    return flags


def short_help(parser: argparse.ArgumentParser, groups: Mapping[str, Sequence[str]]) -> str:
    """Return the text of ``--help``: the flags by group, each with the beginning of its help."""
    flags = actions_of(parser)
    width = min(100, shutil.get_terminal_size().columns)
    lines = [f"usage: {parser.prog} [flags]", ""]
    lines += [*textwrap.wrap(" ".join((parser.description or "").split()), width), ""]
    for title, names in groups.items():
        found = [flags[name] for name in names if name in flags]
        if found:
            lines += [f"{title}:", *(line for flag in found for line in _lines(flag, width)), ""]
    lines += [
        "A switch may be given true or false, too. --help_all lists every flag. --log_format json",
        "makes each line that is logged a JSON object.",
        "",
    ]
    return "\n".join([*lines, EXIT_CODES, ""])


def _lines(action: argparse.Action, width: int) -> list[str]:
    name = max(action.option_strings[:2], key=lambda flag: ("_" in flag, flag.startswith("--")))
    head = f"  {name} {_value(action)}".rstrip()
    help = (action.help or "").replace("%%", "%")
    sentence = re.split(r"(?<=\w)[.;]\s", " ".join(help.split()), maxsplit=1)[0].rstrip(".")
    default = action.default
    if not (default in (None, "", argparse.SUPPRESS) or default is False):
        sentence += f" (default: {default})"
    text = textwrap.wrap(sentence, max(20, width - _INDENT))
    if len(head) < _INDENT - 1:
        text[0] = head.ljust(_INDENT) + text[0]
    else:
        text.insert(0, head)
    return [text[0], *(" " * _INDENT + line for line in text[1:])]


def _value(action: argparse.Action) -> str:
    if action.nargs in (0, "?"):  # a switch needs no value
        return ""
    if action.metavar is not None:
        return str(action.metavar)
    if action.choices is not None:
        choices = "|".join(str(choice) for choice in action.choices)
        return choices if len(choices) < 40 else "NAME"
    kind = {int: "N", float: "X"}.get(action.type, "TEXT")  # type: ignore[call-overload]
    return f"{kind} ..." if action.nargs == "+" else kind

"""The texts of `--help`, the flags that matter to most runs, and of `--help_all`, every flag."""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from shared.compat import parser_actions
from student_trainer.config.flags import Flag

EXIT_CODES = """\
exit codes: 0 done (also when Ctrl-C or SIGTERM ends training: a checkpoint is saved), 1 the run
failed (teacher lost, disk full, not finite), 2 wrong flags, key or data, 130 Ctrl-C, 143 SIGTERM;
the last two before training begins, or sent twice."""

# Titles in the order of `--help_all`; each flag names its group where it is declared.
GROUPS = (
    "model", "data", "chat template", "teacher", "method and divergence",
    "rollouts and generation", "generation", "training", "memory and speed", "LoRA",
    "evaluation and logs", "checks and results", "the command itself",
)  # fmt: skip
_COMMAND = "the command itself"
_OTHERS = "transformers' Trainer"

_INDENT = 30


def add_help(parser: argparse.ArgumentParser, flags: Mapping[str, Flag]) -> None:
    """Add ``--help`` and ``--help_all`` to a parser that was made without help."""
    parser.add_argument(
        "-h", "--help", action=_Show, text=lambda: short_help(parser, flags),
        help="Show the flags that matter to most runs, and stop.",
    )  # fmt: skip
    parser.add_argument(
        "--help_all", action=_Show, text=lambda: long_help(parser, flags),
        help="Show every flag, those of transformers' Trainer too, with its whole text.",
    )  # fmt: skip


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


def by_group(names: Iterable[str], flags: Mapping[str, Flag]) -> dict[str, list[str]]:
    """Return the names of flags by the title of their group, in the order of `GROUPS`.

    A name that ``flags`` lacks belongs to the command itself. Groups may be empty.
    """
    groups: dict[str, list[str]] = {title: [] for title in (*GROUPS, _OTHERS)}
    for name in names:
        groups[(flags[name].group or _OTHERS) if name in flags else _COMMAND].append(name)
    return groups


def summary(flag: Flag | argparse.Action) -> str:
    """Return the first sentence of a flag's help, without its full stop."""
    text = " ".join((flag.help or "").replace("%%", "%").split())
    return re.split(r"(?<=[\w)])[.;]\s", text, maxsplit=1)[0].rstrip(".")


def short_help(parser: argparse.ArgumentParser, flags: Mapping[str, Flag]) -> str:
    """Return the text of ``--help``: the common flags by group, and an example."""
    names = [name for name in actions_of(parser) if name not in flags or flags[name].common]
    text = _text(
        parser, by_group(names, flags), summary,
        "These are the flags that matter to most runs; --help_all lists every flag.",
    )  # fmt: skip
    example = textwrap.indent(parser.epilog or "", "  ")
    return f"{text}\nexample:\n{example}\n" if example else text


def long_help(parser: argparse.ArgumentParser, flags: Mapping[str, Flag]) -> str:
    """Return the text of ``--help_all``: every flag by group, each with all of its help."""
    groups = by_group(actions_of(parser), flags)
    return _text(parser, groups, lambda action: (action.help or "").replace("%%", "%"))


def _text(
    parser: argparse.ArgumentParser,
    groups: Mapping[str, Sequence[str]],
    say: Callable[[argparse.Action], str],
    end: str = "",
) -> str:
    actions = actions_of(parser)
    width = min(100, shutil.get_terminal_size().columns)
    lines = [f"usage: {parser.prog} [flags]", ""]
    lines += [*textwrap.wrap(" ".join((parser.description or "").split()), width), ""]
    for title, names in groups.items():
        if names:
            found = [line for name in names for line in _lines(actions[name], say, width)]
            lines += [f"{title}:", *found, ""]
    switches = "A switch may be given true or false, too."
    logs = "--log_format json makes each line that is logged a JSON object."
    lines += textwrap.wrap(f"{end} {switches} {logs}".strip(), width)
    return "\n".join([*lines, "", EXIT_CODES, ""])


def _lines(action: argparse.Action, say: Callable[[argparse.Action], str], width: int) -> list[str]:
    name = max(action.option_strings[:2], key=lambda flag: ("_" in flag, flag.startswith("--")))
    head = f"  {name} {_value(action)}".rstrip()
    sentence, default = " ".join(say(action).split()), action.default
    if not (default in (None, "", [], argparse.SUPPRESS) or default is False):
        sentence += f" (default: {default})"
    text = textwrap.wrap(sentence, max(20, width - _INDENT)) or [""]
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

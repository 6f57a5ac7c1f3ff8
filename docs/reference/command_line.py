"""The pages of both commands, from their own parsers.

Run as a script it prints the table of common flags, for README.md.
"""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any
from unittest import mock

from markdown_text import escaped

import student_trainer.commands.main
import teacher_server.cli
from shared.compat import parser_actions
from student_trainer.config.checks import UNSUPPORTED
from student_trainer.config.commands import ARGUMENTS
from student_trainer.config.flags import Flag, flags_of
from student_trainer.config.help import GROUPS, by_group, summary

Main = Callable[[Sequence[str]], int]


class _FoundError(Exception):
    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self.parser = parser


def student_trainer_page() -> str:
    """Return the page of the trainer's commands: the common flags, then all of them by group."""
    main = student_trainer.commands.main.main
    lines = [
        "# student-trainer",
        "",
        "From the command's own parser. A flag may be written with dashes instead of underscores; "
        "`--config FILE.yaml` holds the same names, and the command line wins.",
        "",
        f"```text\n{student_trainer.commands.main.USAGE}\n```",
        "",
        "## Flags that matter to most runs",
        "",
        "The flags that `student-trainer distill --help` lists.",
        "",
        *common_table(),
    ]
    flags = {command: _flags(kinds) for command, kinds in ARGUMENTS.items()}
    distill = _by_name(_parser(main, "student-trainer distill", ["distill"]))
    names = [name for name in distill if name in flags["distill"] and name not in UNSUPPORTED]
    groups = by_group(names, flags["distill"])
    for title, of_group in groups.items():
        if title in GROUPS and of_group:
            lines += ["", f"## {title[0].upper()}{title[1:]}", ""]
        for name in of_group if title in GROUPS else ():
            lines += _entry(distill[name], f"flag-{name}", after=_takers(name, flags))
    lines += _of_transformers(
        [name for title in groups.keys() - {*GROUPS} for name in groups[title]]
    )
    for command in ("evaluate", "merge", "study", "report", "doctor"):
        parser = _parser(main, f"student-trainer {command}", [command])
        own = _by_name(parser, without=("help", "help_all", "config"))
        shared = [name for name in own if _is_shared(name, command)]
        lines += ["", f"## {command}", "", escaped(parser.description or ""), ""]
        if shared:
            lines += ["As above: " + ", ".join(f"`--{name}`" for name in shared) + ".", ""]
        for name in own:
            if name not in shared:
                lines += _entry(own[name], f"{command}-{name}")
    return "\n".join(lines) + "\n"


def common_table() -> list[str]:
    """Return the table of the flags that `student-trainer distill --help` lists."""
    flags = _flags(ARGUMENTS["distill"])
    groups = by_group([name for name, one in flags.items() if one.common], flags)
    rows = [
        f"| `--{name}` | {escaped(summary(flags[name]))}{_default(flags[name])} |"
        for names in groups.values()
        for name in names
    ]
    return ["| flag | what it sets |", "| --- | --- |", *rows]


def _default(flag: Flag) -> str:
    unset = flag.default is False or flag.default in (None, "", [])
    return "" if unset else f" (default: {flag.default})"


def _flags(kinds: Iterable[type[Any]]) -> dict[str, Flag]:
    """Return the flags of a command's dataclasses by name."""
    return {name: one for kind in kinds for name, one in flags_of(kind).items()}


def _takers(name: str, flags: Mapping[str, Mapping[str, Flag]]) -> str:
    """Return what to say of a flag that `sft` does not take; empty otherwise."""
    return "" if name in flags["sft"] else "Not for `sft`."


def _is_shared(name: str, command: str) -> bool:
    """Return whether a command has a flag from dataclasses that `distill` has as well."""
    shared = [k for k in ARGUMENTS.get(command, ()) if k in ARGUMENTS["distill"]]
    own = [k for k in ARGUMENTS.get(command, ()) if k not in ARGUMENTS["distill"]]
    return name in _flags(shared) and name not in _flags(own)


def teacher_server_page() -> str:
    """Return the page of the commands `serve` and `bench`."""
    top = _parser(teacher_server.cli.main, "teacher-server", [])
    commands = next(a.choices for a in parser_actions(top) if isinstance(a.choices, dict))
    parser = commands["serve"]
    lines = ["# teacher-server", "", "From the command's own parser.", "", "## serve", ""]
    for actions in _by_name(parser, without=("help",)).values():
        lines += _entry(actions, f"serve-{actions[0].dest}")
    for section in (parser.epilog or "").strip().split("\n\n"):
        title, _, text = section.partition("\n")
        lines += ["", f"## {title}", "", escaped(inspect.cleandoc("\n" + text))]
    bench = commands["bench"]
    lines += [
        "",
        "## bench",
        "",
        escaped(bench.description or "") + " " + escaped(bench.epilog or ""),
    ]
    for actions in _by_name(bench, without=("help",)).values():
        lines += ["", *_entry(actions, f"bench-{actions[0].dest}")]
    return "\n".join(lines) + "\n"


def _parser(main: Main, prog: str, argv: Sequence[str]) -> argparse.ArgumentParser:
    """Return the parser named ``prog`` of a command, without running the command."""
    parse = argparse.ArgumentParser.parse_known_args

    def stop(parser: argparse.ArgumentParser, *given: Any, **options: Any) -> Any:
        if parser.prog != prog:
            return parse(parser, *given, **options)
        raise _FoundError(parser)

    with mock.patch.object(argparse.ArgumentParser, "parse_known_args", stop):
        try:
            main(argv)
        except _FoundError as found:
            return found.parser
    raise AssertionError(f"nothing called {prog} parsed {argv}")


def _by_name(
    parser: argparse.ArgumentParser, *, without: Sequence[str] = ("help", "config")
) -> dict[str, list[argparse.Action]]:
    """Return the arguments by destination, which `--x` and `--no_x` share."""
    found: dict[str, list[argparse.Action]] = {}
    for action in parser_actions(parser):
        if action.dest not in without:
            found.setdefault(action.dest, []).append(action)
    return found


def _entry(actions: Sequence[argparse.Action], anchor: str, *, after: str = "") -> list[str]:
    """Return the entry of a flag: a heading, so that it can be linked to, and the parser's text."""
    first = actions[0]
    names = [name for action in actions for name in _names(action)]
    sentences = [escaped(first.help or "")]
    if sentences[0] and not sentences[0].endswith((".", "…", ")")):
        sentences[0] += "."
    if first.choices is not None:
        sentences.append("One of " + ", ".join(f"`{choice}`" for choice in first.choices) + ".")
    if first.nargs in ("+", "*"):
        sentences.append("Takes several values.")
    if "(default: " not in (first.help or "") and first.default not in (None, "", False):
        sentences.append(f"Default: `{first.default}`.")
    if after:
        sentences.append(after)
    return [f"### `{', '.join(names)}` {{#{anchor}}}", "", " ".join(sentences), ""]


def _names(action: argparse.Action) -> list[str]:
    """Return the names of a flag, of --a_b and --a-b only the first."""
    names = action.option_strings
    twins = {name.replace("_", "-") for name in names if "_" in name}
    return [name for name in names if name not in twins] or [str(action.metavar or action.dest)]


def _of_transformers(names: Sequence[str]) -> list[str]:
    """Return the section of transformers' other flags: a line each, and those refused here."""
    flags = _flags(ARGUMENTS["sft"])
    lines = ["", "## TrainingArguments", "", "The other flags of transformers' own."]
    for name in names:
        default = flags[name].default
        suffix = "" if default in (None, "", False) else f" Default: `{default}`."
        sentence = flags[name].help.replace("%%", "%").strip()
        lines += ["", f"`--{name}`", f":   {escaped(sentence)}{suffix}"]
    lines += ["", "### Refused", "", "What could have no effect here:", ""]
    return lines + [f"- `--{name}` {escaped(why)}" for name, why in UNSUPPORTED.items()]


if __name__ == "__main__":
    sys.stdout.write("\n".join(common_table()) + "\n")

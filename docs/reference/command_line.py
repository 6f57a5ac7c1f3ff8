"""The pages of both commands, from their own parsers."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from typing import Any
from unittest import mock

from markdown_text import escaped
from transformers import TrainingArguments

import student_trainer.commands.main
import teacher_server.cli
from shared.compat import parser_actions
from student_trainer.config.arguments import DivergenceFlags, RunFlags
from student_trainer.config.checks import UNSUPPORTED
from student_trainer.config.parse import ARGUMENTS

_TITLES = {
    "ModelArguments": "Model",
    "AdapterArguments": "Adapters",
    "DatasetArguments": "Dataset",
    "DataArguments": "Rows",
    "GenerationArguments": "Generation",
    "TemplateArguments": "Chat template",
    "TeacherArguments": "Teacher",
    "RunFlags": "Training",
    "DivergenceFlags": "Distillation",
    "EvaluateArguments": "Evaluation",
    "MergeArguments": "Merging",
}


Main = Callable[[Sequence[str]], int]


class _FoundError(Exception):
    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self.parser = parser


def student_trainer_page() -> str:
    """Return the page of the trainer's commands, whose shared flags come first, by subject."""
    main = student_trainer.commands.main.main
    lines = [
        "# student-trainer",
        "",
        "From the command's own parser. A flag may be written with dashes instead of underscores; "
        "`--config FILE.yaml` holds the same names, and the command line wins.",
        "",
        f"```text\n{student_trainer.commands.main.USAGE}\n```",
    ]
    of_command = {
        name: _by_name(_parser(main, f"student-trainer {name}", [name])) for name in ARGUMENTS
    }
    for name, group in _groups():
        takers = [c for c, groups in ARGUMENTS.items() if any(issubclass(g, group) for g in groups)]
        names = ", ".join(f"`{c}`" for c in takers).replace("`distill`", "`distill`, `precompute`")
        about = inspect.cleandoc(group.__doc__ or "").split("\n\n")[0]
        lines += ["", f"## {name}", "", f"{escaped(about)} For {names}.", ""]
        for flag in _own(group):
            lines += _entry(of_command[takers[0]][flag], f"{name.lower()}-{flag}")
    for command in ("study", "report", "doctor"):
        parser = _parser(main, f"student-trainer {command}", [command])
        lines += ["", f"## {command}", "", escaped(parser.description or ""), ""]
        for actions in _by_name(parser).values():
            lines += _entry(actions, f"{command}-{actions[0].dest}")
    return "\n".join([*lines, *_of_transformers(of_command["sft"])]) + "\n"


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


def _groups() -> Iterable[tuple[str, type[Any]]]:
    """Yield every dataclass of flags once, with the title of its section."""
    every = dict.fromkeys(g for groups in ARGUMENTS.values() for g in groups)
    for group in [*(g for g in every if not issubclass(g, RunFlags)), RunFlags, DivergenceFlags]:
        yield _TITLES[group.__name__], group


def _own(group: type[Any]) -> list[str]:
    """Return the flags that a dataclass declares itself, without those that it inherits."""
    return [f.name for f in fields(group) if f.init and f.name in inspect.get_annotations(group)]


def _entry(actions: Sequence[argparse.Action], anchor: str) -> list[str]:
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
    return [f"### `{', '.join(names)}` {{#{anchor}}}", "", " ".join(sentences), ""]


def _names(action: argparse.Action) -> list[str]:
    """Return the names of a flag, of --a_b and --a-b only the first."""
    names = action.option_strings
    twins = {name.replace("_", "-") for name in names if "_" in name}
    return [name for name in names if name not in twins] or [str(action.metavar or action.dest)]


def _of_transformers(by_name: dict[str, list[argparse.Action]]) -> list[str]:
    """Return the section of transformers' own flags: a line each, and those refused here."""
    inherited = [f.name for f in fields(TrainingArguments) if f.name in by_name]
    inherited = [name for name in inherited if name not in _own(RunFlags)]
    lines = [
        "",
        "## TrainingArguments",
        "",
        "transformers' own, for `sft`, `distill`, `precompute`.",
    ]
    for name in inherited:
        if name in UNSUPPORTED:
            continue
        action = by_name[name][0]
        default = "" if action.default in (None, "", False) else f" Default: `{action.default}`."
        sentence = (action.help or "").strip().split("\n\n")[0]
        lines += ["", f"`--{name}`", f":   {escaped(' '.join(sentence.split()))}{default}"]
    lines += ["", "### Refused", "", "What could have no effect here:", ""]
    return lines + [f"- `--{name}` {escaped(why)}" for name, why in UNSUPPORTED.items()]

"""The command `completion`: a script with which a shell completes commands, flags and values."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from shared.command_line import OneLineParser
from shared.shell_completion import SHELLS, CommandArguments, arguments_of, completion_script

_DESCRIPTION = """\
Print a completion script. In bash: eval "$(student-trainer completion bash)", or put the output
into ~/.local/share/bash-completion/completions/student-trainer. In zsh, after compinit: source
<(student-trainer completion zsh). In fish: into ~/.config/fish/completions/student-trainer.fish."""


def completion(argv: Sequence[str]) -> None:
    """Print the completion script of a shell."""
    arguments = _parser().parse(argv)
    sys.stdout.write(completion_script(arguments.shell, "student-trainer", commands()))


def _parser() -> OneLineParser:
    parser = OneLineParser(prog="student-trainer completion", description=_DESCRIPTION)
    parser.add_argument("shell", choices=SHELLS)
    return parser


def commands() -> dict[str, CommandArguments]:
    """Return every command with its flags."""
    # The parsers of all commands take a second to import, for which --help does not wait.
    from student_trainer.commands.doctor import make_parser as doctor
    from student_trainer.commands.registry import COMMANDS
    from student_trainer.config.parse import ARGUMENTS, make_parser
    from student_trainer.reporting.command import make_parser as report
    from student_trainer.study.command import make_parser as study

    others = {"completion": _parser, "doctor": doctor, "report": report, "study": study}
    found = {}
    for name, command in COMMANDS.items():
        if name in others:
            found[name] = arguments_of(others[name](), command.help)
        else:
            types = ARGUMENTS["distill" if name == "precompute" else name]
            prog = f"student-trainer {name}"
            found[name] = arguments_of(make_parser(*types, prog=prog, description=""), command.help)
    return found

"""The command `completion`: a script with which a shell completes commands, flags and values."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from shared.command_line import OneLineParser
from shared.shell_completion import SHELLS, CommandArguments, arguments_of, completion_script
from student_trainer.config import parse
from student_trainer.config.commands import COMMANDS, imported

_DESCRIPTION = """\
Print a completion script. In bash: eval "$(student-trainer completion bash)", or put the output
into ~/.local/share/bash-completion/completions/student-trainer. In zsh, after compinit: source
<(student-trainer completion zsh). In fish: into ~/.config/fish/completions/student-trainer.fish."""


def completion(argv: Sequence[str]) -> None:
    """Print the completion script of a shell."""
    arguments = make_parser().parse(argv)
    sys.stdout.write(completion_script(arguments.shell, "student-trainer", commands()))


def make_parser() -> OneLineParser:
    """Make the parser of `completion`."""
    parser = OneLineParser(prog="student-trainer completion", description=_DESCRIPTION)
    parser.add_argument("shell", choices=SHELLS)
    return parser


def commands() -> dict[str, CommandArguments]:
    """Return every command with its flags."""
    found = {}
    for name, command in COMMANDS.items():
        if command.parser:
            parser = imported(command.parser)()
        else:
            prog = f"student-trainer {name}"
            parser = parse.make_parser(*command.arguments, prog=prog, description="")
        found[name] = arguments_of(parser, command.help)
    return found

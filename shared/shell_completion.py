"""Write shell-completion scripts for bash, zsh and fish from a command's parsers.

The scripts hold all flags and choices, because asking the command at each TAB would import torch.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from shared.compat import parser_actions

SHELLS = ("bash", "zsh", "fish")


@dataclass(frozen=True)
class CommandArguments:
    """The arguments that a subcommand takes, for shell completion.

    Attributes:
        help: one line about the subcommand.
        flags: help of each long flag.
        values: choices of each flag that has choices.
        switches: flags that are complete without a value.
        choices: of the subcommand's own argument, if it has any.
    """

    help: str
    flags: dict[str, str] = field(default_factory=dict)
    values: dict[str, list[str]] = field(default_factory=dict)
    switches: frozenset[str] = frozenset()
    choices: Sequence[str] = ()


def arguments_of(parser: argparse.ArgumentParser, help: str) -> CommandArguments:
    """Return the arguments of a subcommand's parser.

    Each flag is listed under its first long name, without its ``--no_`` twin.
    """
    flags: dict[str, str] = {}
    values: dict[str, list[str]] = {}
    switches, positional, seen = set(), list[str](), set[str]()
    for action in parser_actions(parser):
        names = [name for name in action.option_strings if name.startswith("--")]
        choices = [str(choice) for choice in action.choices or ()]
        if not action.option_strings:
            positional += choices
        elif names and action.dest not in seen:
            seen.add(action.dest)
            flags[names[0]] = (action.help or "").replace("%%", "%").split(". ")[0].split("\n")[0]
            if choices:
                values[names[0]] = choices
            if action.nargs in (0, "?"):
                switches.add(names[0])
    return CommandArguments(help, flags, values, frozenset(switches), positional)


def completion_script(shell: str, prog: str, commands: Mapping[str, CommandArguments]) -> str:
    """Return the completion script of a command for ``shell``, one of `SHELLS`."""
    if shell == "fish":
        return _fish(prog, commands)
    if shell == "bash":
        return _bash(prog, commands)
    start = f"#compdef {prog}\nautoload -U +X bashcompinit && bashcompinit\n"
    return start + _bash(prog, commands)


def _bash(prog: str, commands: Mapping[str, CommandArguments]) -> str:
    """Return a bash function, which zsh's bashcompinit runs too; the rest completes to files."""
    name = "_" + prog.replace("-", "_")
    values = [
        f'    "{command} {flag}") words="{" ".join(choices)}" ;;'
        for command, known in commands.items()
        for flag, choices in known.values.items()
    ]
    # Any other flag that takes a value completes to files, because its values are unknown here.
    open_ended = [
        f'    "{command} {flag}") return ;;'
        for command, known in commands.items()
        for flag in known.flags
        if flag not in known.switches and flag not in known.values
    ]
    flags = [
        f'        {command}) words="{" ".join([*known.choices, *known.flags])}" ;;'
        for command, known in commands.items()
    ]
    return "\n".join([
        f"{name}() {{",
        '  local current="${COMP_WORDS[COMP_CWORD]}" before="${COMP_WORDS[COMP_CWORD-1]}" words=""',
        "  COMPREPLY=()",
        '  case "${COMP_WORDS[1]} $before" in',
        *values,
        *open_ended,
        "    *)",
        '      if [ "$COMP_CWORD" -eq 1 ]; then',
        f'        words="{" ".join(commands)} --help --version"',
        '      else case "${COMP_WORDS[1]}" in',
        *flags,
        "      esac; fi ;;",
        "  esac",
        '  COMPREPLY=($(compgen -W "$words" -- "$current"))',
        "}",
        f"complete -o default -F {name} {prog}",
        "",
    ])  # fmt: skip


def _fish(prog: str, commands: Mapping[str, CommandArguments]) -> str:
    begin = f"complete -c {prog}"
    lines = [f"{begin} -n __fish_use_subcommand -f"]
    for command, known in commands.items():
        lines.append(f"{begin} -n __fish_use_subcommand -a {command} -d {_quoted(known.help)}")
        inside = f"{begin} -n {shlex.quote(f'__fish_seen_subcommand_from {command}')}"
        if known.choices:
            lines.append(f"{inside} -f -a {shlex.quote(' '.join(known.choices))}")
        for flag, help in known.flags.items():
            line = f"{inside} -l {flag.removeprefix('--')}"
            if flag in known.values:
                line += f" -x -a {shlex.quote(' '.join(known.values[flag]))}"
            elif flag not in known.switches:
                line += " -r"
            lines.append(f"{line} -d {_quoted(help)}")
    return "\n".join([*lines, ""])


def _quoted(text: str) -> str:
    """Quote text for fish, which escapes single quotes within single quotes."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"

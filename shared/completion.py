"""Completion scripts for bash, zsh and fish, from what a command's parsers know.

The scripts hold all words themselves: asking the command at each TAB would wait for torch.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

SHELLS = ("bash", "zsh", "fish")


@dataclass(frozen=True)
class Words:
    """What a subcommand can be followed by.

    Attributes:
        help: of the subcommand, a line.
        flags: each long flag with its help.
        values: of a flag that takes one of a few, these.
        switches: flags that are complete without a value.
        words: of the subcommand itself, if it takes one of a few.
    """

    help: str
    flags: dict[str, str] = field(default_factory=dict)
    values: dict[str, list[str]] = field(default_factory=dict)
    switches: frozenset[str] = frozenset()
    words: Sequence[str] = ()


def words_of(parser: argparse.ArgumentParser, help: str) -> Words:
    """Of a parser of one subcommand; flags under their first long name, without ``--no_`` twins."""
    flags: dict[str, str] = {}
    values: dict[str, list[str]] = {}
    switches, positional, seen = set(), list[str](), set[str]()
    for action in parser._actions:  # argparse has no public name for them
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
    return Words(help, flags, values, frozenset(switches), positional)


def script(shell: str, prog: str, commands: Mapping[str, Words]) -> str:
    """What the shell is to read; ``shell`` is one of `SHELLS`."""
    if shell == "fish":
        return _fish(prog, commands)
    if shell == "bash":
        return _bash(prog, commands)
    start = f"#compdef {prog}\nautoload -U +X bashcompinit && bashcompinit\n"
    return start + _bash(prog, commands)


def _bash(prog: str, commands: Mapping[str, Words]) -> str:
    """A function that zsh's bashcompinit understands as well; other words complete to files."""
    name = "_" + prog.replace("-", "_")
    values = [
        f'    "{command} {flag}") words="{" ".join(choices)}" ;;'
        for command, known in commands.items()
        for flag, choices in known.values.items()
    ]
    # After any other flag that takes a value there is a file, or what only the user knows.
    open_ended = [
        f'    "{command} {flag}") return ;;'
        for command, known in commands.items()
        for flag in known.flags
        if flag not in known.switches and flag not in known.values
    ]
    flags = [
        f'        {command}) words="{" ".join([*known.words, *known.flags])}" ;;'
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


def _fish(prog: str, commands: Mapping[str, Words]) -> str:
    begin = f"complete -c {prog}"
    lines = [f"{begin} -n __fish_use_subcommand -f"]
    for command, known in commands.items():
        lines.append(f"{begin} -n __fish_use_subcommand -a {command} -d {_quoted(known.help)}")
        inside = f"{begin} -n {shlex.quote(f'__fish_seen_subcommand_from {command}')}"
        if known.words:
            lines.append(f"{inside} -f -a {shlex.quote(' '.join(known.words))}")
        for flag, help in known.flags.items():
            line = f"{inside} -l {flag.removeprefix('--')}"
            if flag in known.values:
                line += f" -x -a {shlex.quote(' '.join(known.values[flag]))}"
            elif flag not in known.switches:
                line += " -r"
            lines.append(f"{line} -d {_quoted(help)}")
    return "\n".join([*lines, ""])


def _quoted(text: str) -> str:
    """For fish, which knows no quote within quotes but an escaped one."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"

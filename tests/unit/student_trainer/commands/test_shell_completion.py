"""Completion scripts, read and asked by the shells themselves."""

import os
import pty
import select
import shlex
import shutil
import subprocess
import time

import pytest

from student_trainer.commands.main import main
from student_trainer.commands.shell_completion import commands
from student_trainer.config.commands import COMMANDS
from teacher_server.cli import main as teacher_server


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    """Files by shell and program."""
    folder = tmp_path_factory.mktemp("scripts")
    with pytest.MonkeyPatch.context() as patch:
        for shell in ("bash", "zsh", "fish"):
            for name, command in (("student-trainer", main), ("teacher-server", teacher_server)):
                with (folder / f"{name}.{shell}").open("w") as file:
                    patch.setattr("sys.stdout", file)
                    assert command(["completion", shell]) == 0
    return folder


def bash(scripts, *words):
    """Return what bash offers for the last word."""
    program = words[0]
    line = (
        f"source {scripts}/{program}.bash; set -- {shlex.join(words)}; "
        'COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); '
        f"set -- $(complete -p {program}); "
        'while [ "$1" != -F ]; do shift; done; "$2"; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(
        ["bash", "--norc", "-c", line], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stderr == ""
    return done.stdout.split()


def fish(scripts, *words):
    line = f"source {scripts}/{words[0]}.fish; complete -C {shlex.quote(' '.join(words))}"
    done = subprocess.run(
        ["fish", "--no-config", "-c", line], capture_output=True, text=True, timeout=60
    )
    assert done.stderr == ""
    return [offered.split("\t")[0] for offered in done.stdout.splitlines()]


def zsh(scripts, line, completed):
    """Type a line and TAB into zsh; returns what it shows, up to ``completed`` if that comes."""
    child, terminal = pty.fork()
    if child == 0:
        os.execvpe("zsh", ["zsh", "-f", "-i"], {**os.environ, "TERM": "dumb"})
    setup = f"autoload -U compinit && compinit -u -D && source {scripts}/{line.split()[0]}.zsh"
    try:
        os.write(terminal, f"{setup}; echo READY\n".encode())
        _until(terminal, "\nREADY")
        os.write(terminal, f"{line}\t".encode())
        return _until(terminal, completed)
    finally:
        os.close(terminal)
        os.waitpid(child, 0)


def _until(terminal, text):
    """Return what comes until ``text`` does, for half a minute at most."""
    shown, since = "", time.monotonic()
    while text not in shown and time.monotonic() - since < 30:
        if select.select([terminal], [], [], 0.2)[0]:
            shown += os.read(terminal, 4096).decode(errors="replace").replace("\r", "")
    return shown


SHELLS = [
    pytest.param(
        ask, marks=pytest.mark.skipif(not shutil.which(ask.__name__), reason="no such shell")
    )
    for ask in (bash, fish)
]


@pytest.mark.parametrize("ask", SHELLS)
def test_commands_flags_and_values_are_offered(scripts, ask):
    assert ask(scripts, "student-trainer", "di") == ["distill"]
    offered = ask(scripts, "student-trainer", "distill", "--teacher_u")
    assert sorted(offered) == ["--teacher_unreachable", "--teacher_url"]
    values = ask(scripts, "student-trainer", "distill", "--use_peft", "--tail", "")
    assert values == ["bucket", "renormalize"]
    assert ask(scripts, "student-trainer", "distill", "--use_peft", "--lora_r") == ["--lora_r"]
    assert "--suite" not in ask(scripts, "student-trainer", "sft", "--s")
    assert sorted(ask(scripts, "student-trainer", "completion", "f")) == ["fish"]
    assert ask(scripts, "student-trainer", "study", "--dry") == ["--dry_run"]
    assert ask(scripts, "teacher-server", "ser") == ["serve"]
    assert ask(scripts, "teacher-server", "serve", "m", "--backend", "v") == ["vllm"]


def test_bash_offers_files_where_a_flag_takes_anything(scripts):
    assert bash(scripts, "student-trainer", "distill", "--dataset_name", "") == []
    listed = (scripts / "student-trainer.bash").read_text()
    assert "complete -o default -F" in listed  # bash's own: files


@pytest.mark.skipif(not shutil.which("zsh"), reason="no such shell")
def test_zsh_completes_a_value(scripts):
    shown = zsh(scripts, "student-trainer distill --tail ren", "renormalize")
    assert "student-trainer distill --tail renormalize" in shown


def test_every_command_is_completed():
    known = commands()
    assert list(known) == list(COMMANDS)
    assert "--dry_run" in known["precompute"].flags
    assert "--json" in known["doctor"].flags

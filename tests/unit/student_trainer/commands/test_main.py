"""Exit codes, as docs/command-line.md lists them."""

import os
import re
import signal
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from shared import errors
from student_trainer.commands import main as cli
from student_trainer.commands.registry import COMMANDS, Command

DOCUMENT = Path(__file__).parents[4] / "docs" / "command-line.md"


def run(monkeypatch, error):
    def command(words):
        if error is not None:
            raise error

    monkeypatch.setattr(Command, "load", lambda self: command)
    return cli.main(["report"])


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (None, 0),
        (errors.TeacherUnreachableError("x"), 1),
        (errors.TeacherAnswerError("x"), 1),
        (errors.TeacherChangedError("x"), 1),
        (errors.CheckpointError("x"), 1),
        (errors.NonFiniteError("x"), 1),
        (errors.CellFailedError("x"), 1),
        (errors.ConfigurationError("x"), 2),
        (errors.DatasetError("x"), 2),
        (errors.RowTooLongError("x"), 2),
        (errors.TokenizerMismatchError("x"), 2),
        (errors.TeacherUnauthorizedError("x"), 2),
        (ImportError("x"), 2),
        (KeyboardInterrupt(), 130),
    ],
)
def test_each_error_has_its_exit_code(monkeypatch, capsys, error, code):
    assert run(monkeypatch, error) == code
    assert capsys.readouterr().err.startswith("student-trainer: error: " if code else "")
    assert f"| {code} |" in DOCUMENT.read_text()


@pytest.mark.parametrize(
    ("form", "flags", "start"),
    [
        ("json", [], '{"time": "'),
        ("json", ["--log_format", "text"], "student-trainer: error: --config "),
        ("xml", [], "usage: student-trainer"),
    ],
)
def test_the_form_of_logs_may_stand_in_the_file_of_flags(tmp_path, form, flags, start):
    config = tmp_path / "c.yaml"
    config.write_text(f"log_format: {form}\nmodle_name_or_path: x\n")
    ended = subprocess.run(
        [sys.executable, "-m", "student_trainer", "sft", "--config", str(config), *flags],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith(start)
    expected = "modle_name_or_path" if form == "json" else "invalid choice: 'xml'"
    assert expected in ended.stderr
    assert "unknown key 'log_format'" not in ended.stderr


def test_no_command_and_an_unknown_one_end_with_2(capsys):
    assert cli.main([]) == 2
    assert cli.main(["destill"]) == 2
    assert "unknown command 'destill'" in capsys.readouterr().err


def test_every_command_is_in_the_usage_and_in_the_document(capsys):
    assert cli.main(["--help"]) == 0
    usage, document = capsys.readouterr().out, DOCUMENT.read_text()
    for name in COMMANDS:
        assert re.search(rf"^  {name} ", usage, re.MULTILINE)
        assert f"| `{name}` |" in document


def test_signals_before_training_end_with_128_and_their_number(tmp_path):
    """As a shell sees it; Python's own subprocess calls a death by signal N the code -N."""
    words = [
        sys.executable, "-c",
        "import sys, time\nfrom student_trainer.commands import main as cli, registry\n"
        "def wait(words):\n    print('waiting', flush=True)\n    time.sleep(60)\n"
        "registry.Command.load = lambda self: wait\nsys.exit(cli.main(['report']))",
    ]  # fmt: skip
    codes = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        process = subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            # Tests that run in the background of a shell inherit that SIGINT is ignored.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == "waiting\n"
        os.kill(process.pid, number)
        _, error = process.communicate(timeout=60)
        codes[number] = process.returncode if process.returncode >= 0 else 128 - process.returncode
        assert "Traceback" not in error
    assert codes == {signal.SIGINT: 130, signal.SIGTERM: 143}


@pytest.mark.parametrize(
    "error",
    [PackageNotFoundError("transformers"), ModuleNotFoundError("no", name="transformers.x")],
    ids=["metadata", "module"],
)
def test_without_the_extra_a_command_names_it(error, monkeypatch, capsys):
    def load(command):
        raise error

    monkeypatch.setattr(type(cli.COMMANDS["sft"]), "load", load)
    assert cli.main(["sft"]) == 2
    said = "transformers is not installed; pip install 'sparse-gkd[trainer]'"
    assert capsys.readouterr().err == f"student-trainer: error: {said}\n"

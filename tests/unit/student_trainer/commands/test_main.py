"""Exit codes, as docs/reference/command-line.md lists them."""

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
from student_trainer.config.commands import COMMANDS, Command
from student_trainer.config.trainer_flags import trainer_flags

DOCUMENT = Path(__file__).parents[4] / "docs" / "reference" / "command-line.md"


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
        ("xml", [], "student-trainer: error: --log_format: "),
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


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["destill"], "unknown command 'destill'. Did you mean distill?"),
        (["train"], "unknown command 'train'. Did you mean distill?"),
        (["qqq"], "unknown command 'qqq'. There is sft, distill, "),
        (["--log_format", "xml", "sft"], "--log_format: invalid choice: 'xml'"),
        (["sft", "--learning_rate", "x"], "--learning_rate: invalid float value: 'x'"),
        (["sft", "--model", "x"], "'--model'. Did you mean --model_name_or_path?"),
        (
            ["sft", "--beta", "1"],
            "It is a flag of `distill`, `precompute`, `evaluate`, not of `sft`.",
        ),
        (["distill", "rows.jsonl"], "unknown argument 'rows.jsonl'. Each value follows its flag"),
        (["evaluate", "--task", "x"], "Did you mean --suite?"),
        (["precompute", "--teacher", "x"], "Did you mean --teacher_url?"),
        (["merge", "--lora_path", "x"], "Did you mean --model_name_or_path?"),
        (["merge", "--model_name_or_path", "runs/a", "--output_dir", "b"], "folder runs/a does"),
        (["study", "--only"], "--only: expected one argument"),
        (["study"], "FILE.yaml is missing; see `student-trainer study --help`"),
        (["report", "--outputt", "x"], "Did you mean --output?"),
        (
            ["doctor", "--teacher_url", "http://localhost:1", "--model_name_or_path", "./none"],
            "folder ./none does not exist",
        ),
        (["doctor", "--model"], "Did you mean --model_name_or_path?"),
        (["completion", "tcsh"], "shell: invalid choice: 'tcsh'"),
    ],
)
def test_a_mistake_ends_with_2_and_one_line(capsys, argv, message):
    assert cli.main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("student-trainer: error: ")
    assert message in error
    assert error.count("\n") == 1


def test_no_command_ends_with_2():
    assert cli.main([]) == 2


@pytest.mark.parametrize("command", ["sft", "distill", "precompute"])
@pytest.mark.parametrize("flag", ["--dataset_name", "--eval_dataset_name"])
@pytest.mark.parametrize("name", ["./rows", "runs/rows", "rows.jsonl"])
def test_rows_that_are_not_there_are_missed_before_torch_is_imported(
    capsys, tmp_path, command, flag, name
):
    argv = [command, "--model_name_or_path", "org/m", "--output_dir", str(tmp_path / "out")]
    if flag != "--dataset_name":
        argv += ["--dataset_name", "org/rows"]
    if command != "sft":
        argv += ["--teacher_url", "http://localhost:1"]
    if command == "precompute":
        argv += ["--teacher_cache", str(tmp_path / "cache")]
    assert cli.main([*argv, flag, name]) == 2
    assert f"{flag} {name}: no such file or folder" in capsys.readouterr().err


def test_wrong_flags_and_help_wait_for_no_heavy_import():
    """Each of these takes longer to import than an answer may take."""
    trainer_flags()  # with another transformers than the pinned one they are kept from here on
    code = (
        "import contextlib, io, sys\n"
        "from student_trainer.commands.main import main\n"
        "with contextlib.redirect_stdout(io.StringIO()):\n"
        "    for command in ('sft', 'evaluate', 'merge', 'report', 'doctor', 'study'):\n"
        "        with contextlib.suppress(SystemExit):\n"
        "            main([command, '--help'])\n"
        "        main([command, '--prot', 'x'])\n"
        "found = {'torch', 'transformers', 'numpy', 'httpx', 'pydantic'} & set(sys.modules)\n"
        "sys.exit(', '.join(found) or 0)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 0, ended.stderr


def test_an_error_of_the_file_names_its_line(capsys, tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("model_name_or_path: org/m\n\nmax_length: 1\n")
    flags = ["--output_dir", str(tmp_path / "out"), "--dataset_name", "org/d"]
    assert cli.main(["sft", "--config", str(config), *flags]) == 2
    assert f"must be at least 2 ({config}, line 3)" in capsys.readouterr().err


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
        "import sys, time\nfrom student_trainer.commands import main as cli\n"
        "from student_trainer.config import commands\n"
        "def wait(words):\n    print('waiting', flush=True)\n    time.sleep(60)\n"
        "commands.Command.load = lambda self: wait\nsys.exit(cli.main(['report']))",
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

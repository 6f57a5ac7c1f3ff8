"""The quickstart cleans up behind itself, and only behind itself."""

import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time

import httpx
import pytest
import yaml

from examples.mini_humaneval import quickstart, stages
from examples.mini_humaneval.quickstart import Quickstart
from shared.errors import TeacherUnreachableError
from tests.support.http import until
from tests.support.models import save_model, save_tokenizer


def test_the_server_is_stopped_whatever_happens(tmp_path):
    save_tokenizer(tmp_path / "teacher")
    save_model(tmp_path / "teacher")
    run = Quickstart(tmp_path, seed=0)
    with pytest.raises(KeyboardInterrupt), run._served("teacher") as url:  # noqa: PT012
        assert httpx.get(f"{url}/ready").status_code == 200
        raise KeyboardInterrupt
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/ready")


def test_a_teacher_that_does_not_start_is_shown_with_its_log(tmp_path):
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "config.json").write_text("{}")
    with (
        pytest.raises(TeacherUnreachableError, match=r"(?s)ended with 2:.*does not load"),
        Quickstart(tmp_path, seed=0)._served("teacher"),
    ):
        pass


def test_files_of_others_are_never_deleted(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(SystemExit, match="holds files that are not of an earlier quickstart"):
        Quickstart(tmp_path, seed=0).run(None)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_teacher_is_made_once_and_taken_over(tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(quickstart.prepare, "prepare", lambda folder, seed: None)
    monkeypatch.setattr(quickstart.cli, "main", lambda words: commands.append(words[0]) or 0)
    with pytest.raises(SystemExit, match="has no teacher yet; make it with --only teacher"):
        Quickstart(tmp_path, seed=0).run("http://127.0.0.1:1")
    Quickstart(tmp_path, seed=0).make_teacher(again=False)
    assert commands == ["sft", "sft"]
    Quickstart(tmp_path, seed=0).make_teacher(again=False)
    assert commands == ["sft", "sft"]
    student = Quickstart(tmp_path, seed=0)
    student._take_teacher()
    assert set(student.seconds) == {"prepare", "teacher_raw", "teacher_sft"}
    assert len(student.commands) == 2


def test_an_unfinished_teacher_is_made_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(quickstart.prepare, "prepare", lambda folder, seed: None)
    monkeypatch.setattr(quickstart.cli, "main", lambda words: 1)
    with pytest.raises(SystemExit):
        Quickstart(tmp_path, seed=0).make_teacher(again=False)
    monkeypatch.setattr(quickstart.cli, "main", lambda words: 0)
    (tmp_path / "left").mkdir()
    Quickstart(tmp_path, seed=0).make_teacher(again=False)
    assert not (tmp_path / "left").exists()


def test_a_terminated_run_leaves_no_server_behind(tmp_path):
    """Through the command itself, whose stages are shortened to one update each."""
    study = yaml.safe_load(quickstart.STUDY.read_text())
    for cell in study["cells"].values():
        if cell["command"] == "sft":
            cell["flags"] |= {"max_steps": 1, "warmup_steps": 0}
    study["defaults"]["distill"]["max_steps"] = 100_000
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    shorten = (
        "import sys\n"
        "from dataclasses import replace\n"
        "from pathlib import Path\n"
        "from examples.mini_humaneval import settings, quickstart, prepare\n"
        "tiny = replace(settings.SETTINGS, pretrain_rows=64, warmup_rows=32, prompt_rows=64)\n"
        "prepare.prepare.__kwdefaults__['settings'] = tiny\n"
        f"quickstart.STUDY = Path({str(tmp_path / 'study.yaml')!r})\n"
        "sys.exit(quickstart.main())\n"
    )
    output = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-c", shorten, f"--output_dir={output}"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    port, lines = 0, []
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line)
        if line.startswith("$ teacher-server"):
            port = int(line.split("--port ")[1].split()[0])
        if "student_distilled: train" in line:
            break
    assert port, "".join(lines)
    log = output / quickstart.LOG
    while "divergence ." not in log.read_text():  # of a step, so the server is up
        assert process.poll() is None, log.read_text()
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    for _ in range(50):
        try:
            httpx.get(f"http://127.0.0.1:{port}/health")
        except httpx.ConnectError:
            return
        time.sleep(0.1)
    raise AssertionError("the server still runs")


def test_a_file_gets_three_lines_a_stage_and_the_log_the_rest(tmp_path, monkeypatch, capsys):
    """Fewer than 60 lines in all, however many steps there are."""

    def main(words):
        logging.getLogger("student_trainer").warning("a warning")
        for step in range(400):
            sys.stderr.write(f"step {step + 1}/400 · loss .5\n")
        return 0

    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(quickstart.prepare, "prepare", lambda folder, seed: None)
    monkeypatch.setattr(quickstart.cli, "main", main)
    run = Quickstart(tmp_path, seed=0)
    run._shown.expect(3 + len(quickstart.MODELS))
    run.make_teacher(again=True)
    for output in ("student_before", "student_sft", "student_distilled"):
        run._train(output)
    for model in quickstart.MODELS.values():
        run._run(f"evaluate {model}", ["evaluate"])
    written = capsys.readouterr()
    lines = written.out.splitlines()
    assert len(lines) < 45
    assert lines[0] == f"Whole commands, and all that they write: {tmp_path / quickstart.LOG}"
    headings = [line for line in lines if line.startswith("[")]
    assert (
        headings[0] == "[1/11] prepare: make a tokenizer, two models without training, and the data"
    )
    assert headings[-1] == (
        "[11/11] evaluate student_distilled: write 256 held-out programs and run their tests"
    )
    assert all(": " in heading for heading in headings)
    assert max(map(len, lines[1:])) <= 100
    ends = [line for line in lines if line.startswith("  ")]
    assert len(ends) == 11
    assert ends[1].endswith(" s · step 400/400 · loss .5")
    assert (tmp_path / quickstart.LOG).read_text().count("step 400/400") == 10


def test_a_long_command_is_cut_and_whole_in_the_log(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(quickstart.cli, "main", lambda words: 0)
    argv = ["sft", f"--output_dir={'x' * 200}"]
    Quickstart(tmp_path, seed=0)._run("student_sft", argv)
    [shown] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("$")]
    assert len(shown) == 100
    assert shown.endswith("x…")
    assert (
        f"$ student-trainer sft --output_dir={'x' * 200}\n"
        in (tmp_path / quickstart.LOG).read_text()
    )


def test_a_file_gets_signs_of_life(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(stages, "_SIGN_SECONDS", 0.05)
    run = stages.Stages(tmp_path / "log")
    run.expect(1)
    written = []

    def signs():
        written.append(capsys.readouterr().out)
        return re.findall(r"^  \d+ s · step 7/400 · loss \.5$", "".join(written), re.M)

    with run.stage("student_sft"):
        sys.stderr.write("step 7/400 · loss .5\n")
        until(lambda: len(signs()) >= 2)
    assert not [t for t in threading.enumerate() if t.name == "signs-of-life"]


@pytest.mark.parametrize("given", [None, "ACTIVE"])
@pytest.mark.parametrize(
    "program",
    [
        "import examples.mini_humaneval",
        "from student_trainer.commands.main import main; main(['sft', '--nothing'])",
        "from teacher_server.cli import main; main(['serve', 'org/m', '--port', '-1'])",
    ],
    ids=["examples", "student-trainer", "teacher-server"],
)
def test_idle_threads_sleep_unless_told_otherwise(program, given):
    """It is set before torch is imported, and the served teacher inherits it."""
    environment = {name: v for name, v in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {} if given is None else {"OMP_WAIT_POLICY": given}
    script = (
        f"import os, sys; {program}\n"
        "assert 'torch' not in sys.modules\n"
        "print(os.environ['OMP_WAIT_POLICY'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == (given or "PASSIVE")


def test_a_failed_stage_shows_the_end_of_its_log(tmp_path, monkeypatch, capsys):
    def main(words):
        sys.stderr.write("student-trainer: error: no such teacher\n")
        return 1

    monkeypatch.setattr(quickstart.cli, "main", main)
    with pytest.raises(SystemExit, match="1"):
        Quickstart(tmp_path, seed=0)._train("student_sft")
    assert "error: no such teacher" in capsys.readouterr().err


def test_the_stages_add_up_to_the_whole(tmp_path):
    run = Quickstart(tmp_path, seed=0)
    run.seconds = {"prepare": 1.0, "teacher_raw": 2.0, "teacher_sft": 3.0,
                          "student_sft": 4.0, "evaluate a": 5.0, "evaluate b": 6.0}  # fmt: skip
    stages = run._stages()
    assert sum(stages.values()) == 21.0
    assert stages["evaluation"] == 11.0

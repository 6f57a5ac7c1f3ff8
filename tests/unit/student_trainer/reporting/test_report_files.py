"""Files of runs are read again only where they have changed, and of logs only what is new."""

import builtins
import io
import json
from pathlib import Path

import pytest

from shared.errors import DatasetError
from student_trainer.reporting.command import page_of
from student_trainer.reporting.files import Files
from student_trainer.reporting.runs import LIVE_FILE
from student_trainer.reporting.watch import LivePage


def line(step):
    return json.dumps({"step": step, "train/loss": 1.0 / step}) + "\n"


@pytest.fixture
def opened(monkeypatch):
    """The names of the files that are opened, and the bytes that are read of logs."""
    names = []
    sizes = []
    open_file = io.open

    def spy(file, mode="r", *args, **options):
        found = open_file(file, mode, *args, **options)
        if Path(str(file)).suffix in (".json", ".jsonl") and "r" in mode:
            names.append(Path(file).name)
            if "b" in mode:
                read = found.read

                def counted(*size):
                    content = read(*size)
                    sizes.append(len(content))
                    return content

                return Counted(found, counted)
        return found

    monkeypatch.setattr(io, "open", spy)
    monkeypatch.setattr(builtins, "open", spy)
    return names, sizes


class Counted:
    def __init__(self, file, read):
        self._file, self.read, self.seek = file, read, file.seek

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()


def live(folder, *steps):
    folder.mkdir(exist_ok=True)
    text = json.dumps({"max_steps": 40}) + "\n" + "".join(map(line, steps))
    (folder / LIVE_FILE).write_text(text)


def test_a_page_of_runs_that_have_not_changed_reads_no_file(tmp_path, opened):
    live(tmp_path / "one", 1, 2)
    (tmp_path / "two").mkdir()
    state = {"log_history": [{"step": 1, "train/loss": 1.0}], "max_steps": 1}
    (tmp_path / "two" / "trainer_state.json").write_text(json.dumps(state))
    (tmp_path / "two" / "_held_out_samples.json").write_text(json.dumps({"samples": []}))
    page = LivePage([tmp_path / "one", tmp_path / "two"], lambda found: page_of(found, "runs"))
    first = page.read()
    names, _ = opened
    assert sorted(names) == [
        "_held_out_samples.json", "_log_history.jsonl", "trainer_state.json",
    ]  # fmt: skip
    assert page.read() == first
    assert len(names) == 3
    with (tmp_path / "one" / LIVE_FILE).open("a") as file:
        file.write(line(3))
    assert page.read() != first
    assert names[3:] == [LIVE_FILE]  # that one alone


def test_only_what_was_appended_is_read(tmp_path, opened):
    live(tmp_path / "run", *range(1, 2001))
    files, path = Files(), tmp_path / "run" / LIVE_FILE
    assert len(files.appended_lines(path)) == 2001
    _, sizes = opened
    assert sum(sizes) == path.stat().st_size > 60_000
    sizes.clear()
    with path.open("a") as file:
        file.write(line(2001) + '{"step": 2002, "tra')
    assert files.appended_lines(path)[-1]["step"] == 2001
    assert sum(sizes) < 5000  # the end that it is recognized by, and the new lines
    with path.open("a") as file:
        file.write('in/loss": 0.5}\n')
    assert files.appended_lines(path)[-1] == {"step": 2002, "train/loss": 0.5}


@pytest.mark.parametrize("steps", [(7,), range(10, 90)], ids=["shorter", "longer"])
def test_a_log_that_was_begun_anew_is_read_anew(tmp_path, steps):
    live(tmp_path / "run", 1, 2, 3)
    files, path = Files(), tmp_path / "run" / LIVE_FILE
    files.appended_lines(path)
    live(tmp_path / "run", *steps)
    assert [entry["step"] for entry in files.appended_lines(path)[1:]] == list(steps)


def test_a_file_that_could_not_be_read_is_tried_again(tmp_path):
    path = tmp_path / "trainer_state.json"
    path.write_text('{"a": ')
    files = Files()
    for _ in range(2):
        with pytest.raises(DatasetError, match="not valid JSON"):
            files.json(path)
    path.write_text('{"a": 1}')
    assert files.json(path) == {"a": 1}

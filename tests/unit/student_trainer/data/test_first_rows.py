"""Rows that cannot be read are told before torch is imported, in the words of the reader."""

import gzip
import json
import re
import subprocess
import sys

import pytest

from shared.errors import ConfigurationError, DatasetError
from student_trainer.config.arguments import DataArguments, DatasetArguments
from student_trainer.data.first_rows import check_first_rows, first_rows
from student_trainer.data.rows import load_rows

_GOOD = b'{"prompt": "a", "completion": "b"}\n'
_FILES = {
    "broken.jsonl": (_GOOD + b'{"prompt": \n', r"broken.jsonl:2: not valid JSON"),
    "empty.jsonl": (b"", "empty.jsonl holds no rows"),
    "blank.ndjson": (b"\n \n", "blank.ndjson holds no rows"),
    "array.json": (b"[]", "array.json holds no rows"),
    "mark.jsonl": (b"\xef\xbb\xbf", "mark.jsonl holds no rows"),
    "wide.jsonl": (_GOOD.decode().encode("utf-16"), "wide.jsonl:1: the text is UTF-16"),
    "latin.jsonl": (b'{"prompt": "\xe9"}\n', "latin.jsonl:1: not UTF-8"),
    "zipped.jsonl.gz": (gzip.compress(b"{\n"), "zipped.jsonl.gz:1: not valid JSON"),
    "cut.jsonl.gz": (gzip.compress(_GOOD * 9)[:-12], "cut.jsonl.gz: "),
    "cells.csv": (b"prompt,completion\na\n", "cells.csv:2: 1 cells, but 2 columns"),
}


def _look(*names, **flags):
    check_first_rows(DatasetArguments(dataset_name=list(map(str, names))), DataArguments(**flags))


@pytest.mark.parametrize("name", _FILES)
@pytest.mark.parametrize("place", ["alone", "second", "held out", "in a folder"])
def test_what_the_reader_refuses_is_told_in_its_words(tmp_path, name, place):
    content, message = _FILES[name]
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / name).write_bytes(content)
    (tmp_path / "good.jsonl").write_bytes(_GOOD)
    path = folder if place == "in a folder" else folder / name
    with pytest.raises(DatasetError) as expected:
        load_rows(str(path), config=None, split="train")
    names = [path] if place in ("alone", "in a folder") else [tmp_path / "good.jsonl"]
    names += [path] if place == "second" else []
    held_out = str(path) if place == "held out" else None
    with pytest.raises(DatasetError) as told:
        _look(*names, eval_dataset_name=held_out)
    assert str(told.value) == str(expected.value)
    assert place == "in a folder" or message in str(told.value)


def test_rows_without_the_columns_are_told(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"instuction": "a"}\n')
    with pytest.raises(DatasetError, match=r"a.jsonl:1: neither messages nor 'prompt'"):
        _look(path)
    path.write_bytes(_GOOD)
    with pytest.raises(ConfigurationError, match="--prompt_column promt: no row has this column"):
        _look(path, prompt_column="promt")


def test_a_folder_without_rows_is_told(tmp_path):
    with pytest.raises(DatasetError, match="the folder holds no file of rows"):
        _look(tmp_path)


def test_what_is_slow_to_read_is_left_to_the_run(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"no parquet")
    large = tmp_path / "b.json"
    with large.open("wb") as file:
        file.truncate(2**25)
    slow = [tmp_path / "a.parquet", large, "org/rows", f"{tmp_path}/**/*.json"]
    assert [first_rows(str(name), "train") for name in slow] == [None] * 4


def test_only_the_first_rows_are_read(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(_GOOD * 200 + b"{\n")
    assert len(first_rows(str(path), "train") or []) == 100


def test_the_split_is_warned_of_once(tmp_path, caplog):
    for name in ("train.jsonl", "test.jsonl"):
        (tmp_path / name).write_bytes(_GOOD)
    _look(tmp_path)
    load_rows(str(tmp_path), config=None, split="train")
    assert len(caplog.records) == 1


_COMMANDS = {
    "sft": ["--model_name_or_path", "MODEL", "--output_dir", "OUT", "--dataset_name", "ROWS"],
    "distill": [
        "--model_name_or_path", "MODEL", "--output_dir", "OUT", "--dataset_name", "ROWS",
        "--teacher_url", "http://127.0.0.1:9",
    ],
    "evaluate": ["--model_name_or_path", "MODEL", "--output_dir", "OUT", "--dataset_name", "ROWS"],
    "yaml": ["--config", "CONFIG"],
}  # fmt: skip
_MAIN = """
import sys
from student_trainer.commands.main import main
code = main(sys.argv[1:])
print(code, "torch" in sys.modules)
"""


@pytest.mark.parametrize("command", _COMMANDS)
def test_commands_tell_before_torch_is_imported(tmp_path, command):
    rows, model, config = tmp_path / "a.jsonl", tmp_path / "model", tmp_path / "c.yaml"
    rows.write_bytes(_GOOD[:-2])
    model.mkdir()
    (model / "config.json").write_text("{}")
    names = {"MODEL": model, "OUT": tmp_path / "out", "ROWS": rows, "CONFIG": config}
    of_file = {
        "model_name_or_path": str(model), "dataset_name": str(rows),
        "output_dir": str(tmp_path / "out"),
    }  # fmt: skip
    config.write_text(json.dumps(of_file))
    arguments = [str(names.get(argument, argument)) for argument in _COMMANDS[command]]
    name = "sft" if command == "yaml" else command
    done = subprocess.run(
        [sys.executable, "-c", _MAIN, name, *arguments],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.stdout.split() == ["2", "False"], done.stderr
    assert re.search(r"a.jsonl:1: not valid JSON", done.stderr)


def test_evaluate_tells_rows_without_a_checker_early(tmp_path):
    rows = tmp_path / "a.jsonl"
    rows.write_bytes(_GOOD)
    from student_trainer.commands.evaluate import evaluate

    with pytest.raises(DatasetError, match=r"a.jsonl:1: neither a checker, nor HumanEval's"):
        evaluate([
            "--model_name_or_path", "org/model", "--output_dir", str(tmp_path / "out"),
            "--dataset_name", str(rows),
        ])  # fmt: skip

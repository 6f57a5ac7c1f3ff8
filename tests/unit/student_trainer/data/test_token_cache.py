"""Rows tokenized by several processes, or read from the cache, are those tokenized one by one."""

import os
import signal
from dataclasses import fields

import datasets
import numpy as np
import pytest

from shared.errors import ConfigurationError, DatasetError, RowTooLongError
from student_trainer.config.arguments import DataArguments
from student_trainer.data import token_cache, tokenize
from student_trainer.data.examples import RowTokenizer
from student_trainer.data.sample import Example, Sample
from student_trainer.data.tokenize import tokenize_rows

CHECKER = {"kind": "exact_match", "answer": "1"}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(tokenize, "FEW_ROWS", 100)
    return tmp_path / "sparse-gkd"


def rows_of(count, **others):
    rows = [
        {"prompt": f"say {n} ", "completion": "ü" * (n % 9)} if n % 9 else {"prompt": f"bare {n}"}
        for n in range(count)
    ]
    rows[3]["checker"] = CHECKER
    for number, row in others.items():
        rows[int(number[1:])] = row
    return [(f"d:{n + 1}", row) for n, row in enumerate(rows)]


def examples(tokenizer, rows, *, max_length=60, **options):
    row_tokenizer = RowTokenizer(tokenizer, (1,), DataArguments(), max_length)
    return tokenize_rows(rows, row_tokenizer, progress=False, **options)


def same(first, second):
    """Return whether two examples, or samples, are equal in every field, dtypes included."""
    for field in fields(first):
        a, b = getattr(first, field.name), getattr(second, field.name)
        if isinstance(a, np.ndarray):
            if (
                a.dtype != b.dtype
                or not np.array_equal(a, b)
                or a.flags.writeable != b.flags.writeable
            ):
                return False
        elif isinstance(a, Sample) and isinstance(b, Sample):
            if not same(a, b):
                return False
        elif a != b or type(a) is not type(b):
            return False
    return True


def count_calls(monkeypatch):
    calls = []
    inner = RowTokenizer.__call__
    monkeypatch.setattr(
        RowTokenizer, "__call__", lambda self, *item: calls.append(item[1]) or inner(self, *item)
    )
    return calls


@pytest.mark.parametrize("processes", [1, 2])
def test_processes_and_cache_give_what_one_by_one_gives(tokenizer, folder, processes, monkeypatch):
    rows = rows_of(300)
    monkeypatch.setattr(tokenize, "FEW_ROWS", 1000)
    serial = examples(tokenizer, rows)
    assert not folder.exists()  # few rows are not kept
    monkeypatch.setattr(tokenize, "FEW_ROWS", 100)
    parallel = examples(tokenizer, rows, num_proc=processes)
    assert len(list(folder.glob("*.arrow"))) == 1
    calls = count_calls(monkeypatch)
    cached = examples(tokenizer, rows, num_proc=processes)
    assert calls == []
    assert len(serial) == len(parallel) == len(cached) == 300
    assert serial[3].checker == CHECKER
    assert all(map(same, serial, parallel))
    assert all(map(same, serial, cached))


def test_other_rows_or_options_are_tokenized_anew(tokenizer, folder, monkeypatch):
    rows = rows_of(120)
    calls = count_calls(monkeypatch)
    for count, (given, options) in enumerate(
        [
            (rows, {}),
            (rows, {"max_length": 59}),
            (rows_of(121), {}),
            (rows, {"skip_long_rows": True}),
        ],
        start=1,
    ):
        examples(tokenizer, given, num_proc=1, **options)
        assert len(list(folder.glob("*.arrow"))) == count
    assert len(calls) == 120 * 3 + 121


def test_every_field_of_an_example_is_kept():
    kept = set(token_cache._features())
    # Which of a step's completions it is becomes known when the step is made up.
    of_example = {field.name for field in fields(Example)} - {"sample", "generation"} | {
        "has_sample",
        "has_teacher_prompt",
    }
    of_sample = {field.name for field in fields(Sample)} - {"source", "weight_version"}
    assert kept == of_example | of_sample


def test_what_is_damaged_or_cannot_be_kept_is_tokenized_anew(tokenizer, folder, caplog):
    rows = rows_of(120)
    first = examples(tokenizer, rows, num_proc=1)
    (file,) = folder.glob("*.arrow")
    file.write_bytes(file.read_bytes()[:1000])
    assert all(map(same, first, examples(tokenizer, rows, num_proc=1)))
    assert "is damaged, so the rows are tokenized anew" in caplog.text
    odd = rows_of(120, n5={"prompt": "x", "completion": "y", "checker": {"kind": b"bytes"}})
    assert examples(tokenizer, odd, num_proc=1)[5].checker == {"kind": b"bytes"}
    assert len(list(folder.glob("*"))) == 1


def test_caching_can_be_turned_off_and_a_full_disk_is_a_warning(tokenizer, folder, caplog):
    rows = rows_of(120)
    folder.write_text("a file in the place of the folder")
    assert len(examples(tokenizer, rows, num_proc=1)) == 120
    assert "tokenized rows are not kept" in caplog.text
    folder.unlink()
    datasets.disable_caching()
    try:
        examples(tokenizer, rows, num_proc=1)
    finally:
        datasets.enable_caching()
    assert not folder.exists()


@pytest.mark.parametrize("number", [5, 110, 280])
def test_the_first_row_that_is_wrong_is_named_whatever_the_processes(tokenizer, folder, number):
    rows = rows_of(300, **{f"n{number}": {"prompt": 3}, "n290": {"text": "x"}})
    with pytest.raises(DatasetError, match=rf"^d:{number + 1}: prompt and completion must both"):
        examples(tokenizer, rows, num_proc=2)
    assert not folder.exists()


def test_long_rows_are_counted_and_left_out_in_every_way(tokenizer):
    rows = rows_of(300, n70={"prompt": "x" * 99}, n280={"prompt": "x" * 99})
    with pytest.raises(RowTooLongError, match=r"^d:71: the prompt has .*\. Shorten it$"):
        examples(tokenizer, rows, num_proc=2)
    for _ in ("made", "read"):
        kept = examples(tokenizer, rows, num_proc=2, skip_long_rows=True)
        assert [e.index for e in kept] == [n for n in range(300) if n not in (70, 280)]
    long = [(f"d:{n + 1}", {"prompt": "x" * 99}) for n in range(150)]
    with pytest.raises(DatasetError, match=r"every row is too long\. The last one: d:150"):
        examples(tokenizer, long, num_proc=2, skip_long_rows=True)


def test_a_process_that_is_ended_ends_the_run_with_a_remedy(tokenizer, monkeypatch):
    inner = RowTokenizer.__call__

    def kill(self, index, where, row):
        if where == "d:250":
            os.kill(os.getpid(), signal.SIGKILL)
        return inner(self, index, where, row)

    monkeypatch.setattr(RowTokenizer, "__call__", kill)
    with pytest.raises(ConfigurationError, match="fewer than --dataset_num_proc 2"):
        examples(tokenizer, rows_of(300), num_proc=2)

"""Rows are the same from every kind of file; what cannot be read is named in one line."""

import bz2
import gzip
import json
import logging
import lzma
from pathlib import Path

import datasets
import pyarrow
import pytest

from shared.errors import DatasetError
from student_trainer.data.row_files import is_hub_id
from student_trainer.data.rows import load_rows, named_rows

ROWS = [
    {"prompt": "eins", "completion": 'zwei, "drei"\nvier'},
    {"prompt": "你好", "completion": "007"},
]


def load(path, split="train"):
    return load_rows(str(path), config=None, split=split)


def contents(path, split="train"):
    return [row for _, row in load(path, split)]


def error(path, split="train"):
    with pytest.raises(DatasetError) as caught:
        load(path, split)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write(path: Path, rows=ROWS) -> Path:
    """The rows in the format that the name tells."""
    suffix = path.suffixes[0]
    table = datasets.Dataset.from_list(rows)
    if suffix in (".parquet", ".csv"):
        getattr(table, f"to_{suffix[1:]}")(str(path))
    elif suffix == ".tsv":
        table.to_csv(str(path), sep="\t")
    elif suffix == ".arrow":
        with datasets.arrow_writer.ArrowWriter(path=str(path), features=table.features) as writer:
            writer.write_table(table.data.table)
            writer.finalize()
    else:
        lines = suffix in (".jsonl", ".ndjson")
        text = "".join(json.dumps(row) + "\n" for row in rows) if lines else json.dumps(rows)
        pack = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
        pack[".zst"] = lambda data: pyarrow.compress(data, codec="zstd", asbytes=True)
        data = text.encode()
        path.write_bytes(pack[path.suffix](data) if path.suffix in pack else data)
    return path


@pytest.mark.parametrize(
    "name",
    [
        "r.jsonl", "r.ndjson", "r.json", "r.csv", "r.tsv", "r.parquet", "r.arrow", "r.jsonl.gz",
        "r.jsonl.bz2", "r.json.xz", "r.jsonl.zst", "r.JSONL",
    ],
)  # fmt: skip
def test_every_format_gives_the_same_rows(tmp_path, name):
    if name == "r.JSONL":
        write(tmp_path / "r.jsonl").rename(tmp_path / name)
    else:
        write(tmp_path / name)
    assert contents(tmp_path / name) == ROWS


def test_messages_name_the_line_or_the_row(tmp_path):
    assert [w for w, _ in load(write(tmp_path / "a.jsonl"))] == [
        f"{tmp_path}/a.jsonl:1", f"{tmp_path}/a.jsonl:2",
    ]  # fmt: skip
    # The first row has a line break in a cell, so that the second begins in line 4.
    assert [w for w, _ in load(write(tmp_path / "a.csv"))] == [
        f"{tmp_path}/a.csv:2", f"{tmp_path}/a.csv:4",
    ]  # fmt: skip
    assert load(write(tmp_path / "a.parquet"))[1][0] == f"{tmp_path}/a.parquet row 1"
    assert load(write(tmp_path / "a.json"))[1][0] == f"{tmp_path}/a.json row 1"


def test_lines_in_a_file_called_json_are_rows(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    assert contents(path) == [{"prompt": "a"}, {"prompt": "b"}]
    path.write_text('{\n "data": []\n}')
    assert "neither an array of rows nor a row to a line" in error(path)


def test_cells_of_a_table_stay_text_and_empty_ones_are_none(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("prompt,completion\nNA,007\nnull,\n")
    assert contents(path) == [
        {"prompt": "NA", "completion": "007"}, {"prompt": "null", "completion": None},
    ]  # fmt: skip


def test_rows_of_a_jsonl_file_keep_their_own_columns(tmp_path):
    rows = [{"prompt": "a"}, {"messages": [{"role": "user", "content": None, "x": None}]}]
    assert contents(write_lines(tmp_path / "r.jsonl", rows)) == rows


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


CALLS = [
    {"role": "user", "content": "x"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"function": {"name": "f", "arguments": {"city": "Rom"}}},
            {"function": {"name": "g", "arguments": {"number": 3}}},
            {"function": {"name": "h", "arguments": {}}},
        ],
    },
]


@pytest.mark.parametrize("kind", ["parquet", "saved", "memory"])
def test_what_arrow_fills_in_is_taken_out_and_an_empty_content_stays(tmp_path, kind):
    table = datasets.Dataset.from_list([{"messages": CALLS, "note": None}])
    filled = table[0]["messages"][1]["tool_calls"][0]["function"]["arguments"]
    assert filled == {"city": "Rom", "number": None}  # the fault that is mended
    if kind == "memory":
        ((_, row),) = named_rows(table, "dataset")
    else:
        path = tmp_path / "rows.parquet"
        table.to_parquet(str(path)) if kind == "parquet" else table.save_to_disk(str(path))
        (row,) = contents(path)
    assert row["messages"] == CALLS
    assert "content" in row["messages"][1]
    assert row["note"] is None


def test_rows_in_memory_are_left_as_they_are():
    rows = [{"messages": [{"role": "user", "content": "x", "arguments": {"limit": None}}]}]
    assert [row for _, row in named_rows(rows, "dataset")] == rows


def test_a_saved_dataset_and_a_saved_dict_with_its_splits(tmp_path):
    table = datasets.Dataset.from_list(ROWS)
    table.save_to_disk(str(tmp_path / "one"))
    assert contents(tmp_path / "one") == ROWS
    both = datasets.DatasetDict({"train": table, "test": table.select([1])})
    both.save_to_disk(str(tmp_path / "dict"))
    assert contents(tmp_path / "dict", "test") == ROWS[1:]
    assert "has no split 'dev'; it has test, train" in error(tmp_path / "dict", "dev")


def test_a_folder_holds_files_of_any_format_and_may_name_splits(tmp_path, caplog):
    write(tmp_path / "a.jsonl")
    write(tmp_path / "b.parquet", ROWS[:1])
    (tmp_path / "README.md").write_text("about")
    assert contents(tmp_path) == [*ROWS, ROWS[0]]
    hub = tmp_path / "hub"
    (hub / "data").mkdir(parents=True)
    write(hub / "data" / "train-00000-of-00001.parquet")
    write(hub / "data" / "test-00000-of-00001.parquet", ROWS[:1])
    with caplog.at_level(logging.WARNING):
        assert contents(hub) == ROWS
    assert "not test-00000-of-00001.parquet" in caplog.text
    assert contents(hub, "test") == ROWS[:1]
    assert "no file of the split 'other'; its files are of test, train" in error(hub, "other")


def test_a_glob_takes_what_matches_in_order(tmp_path):
    for name in ("b.jsonl", "a.parquet", "c.jsonl"):
        write(tmp_path / name, [{"prompt": name}])
    assert contents(tmp_path / "[ab].*") == [{"prompt": "a.parquet"}, {"prompt": "b.jsonl"}]
    assert "the pattern matches no file" in error(tmp_path / "*.csv")


def test_a_byte_order_mark_is_no_part_of_the_rows(tmp_path):
    for name, text in {
        "r.jsonl": '{"prompt": "a"}\n', "r.json": '[{"prompt": "a"}]', "r.csv": "prompt\na\n",
    }.items():  # fmt: skip
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
        assert contents(tmp_path / name) == [{"prompt": "a"}]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"prompt": "a \\ud83d"}', r"character 3 of prompt is half a surrogate pair (\ud83d)"),
        ('{"messages": [{"role": "user", "content": "\\udc00"}]}', "of messages[0].content is"),
        ('{"tools": [{"\\ud800": 1}]}', "of a key of tools[0] is half"),
    ],
)
def test_half_a_surrogate_pair_is_refused_with_its_line_and_place(tmp_path, row, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"prompt": "\\ud83d\\ude00"}}\n{row}\n')
    assert error(path).startswith(f"{path}:2: ")
    assert message in error(path)
    with pytest.raises(DatasetError, match="rows row 0: character 1 of a is half a surrogate"):
        named_rows([{"a": "\ud800"}], "rows")


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("r.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', "r.jsonl:2: not UTF-8: byte 8 is 0xff"),
        ("r.jsonl", '{"prompt": "a"}'.encode("utf-16"), "r.jsonl:1: the text is UTF-16"),
        ("r.jsonl", b"[" * 100_000, "r.jsonl:1: not valid JSON"),
        ("r.json", b'[{"prompt": "a"}', "r.json: not valid JSON"),
        ("r.json", b'[{"prompt": "a"}, 3]', "r.json row 1: expected a JSON object, got 3"),
        ("r.csv", b'prompt\n"a', "r.csv:2: not valid CSV"),
        ("r.csv", b"prompt,completion\na,b\na,b,c\n", "r.csv:3: 3 cells, but 2 columns"),
        ("r.csv", b"a,a\nb,b\n", "'a' is there twice"),
        ("r.csv", b"prompt\na\n\xff\n", "not UTF-8, at or after line"),
        ("r.jsonl.gz", b"no gzip", "r.jsonl.gz: Not a gzipped file"),
        ("r.jsonl.gz", gzip.compress(b'{"prompt": 1}\n' * 99, mtime=0)[:-9], "r.jsonl.gz: "),
        ("r.jsonl.xz", b"no xz", "r.jsonl.xz: "),
        ("r.jsonl.zst", b"no zstd", "r.jsonl.zst: "),
        ("r.parquet", b"no parquet", "r.parquet: row 0 and what follows cannot be read as parquet"),
        ("r.txt", b'{"prompt": "a"}', "r.txt: rows are not read from files called so"),
        ("r.parquet.gz", b"x", "rows are not read from files called so"),
        ("rows", b'{"prompt": "a"}', "the name must end in .jsonl"),
        ("r.jsonl", b"", "r.jsonl holds no rows"),
        ("r.json", b"[]", "r.json holds no rows"),
        ("r.csv", b"", "r.csv holds no rows"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_read_is_named_in_one_line(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    assert message in error(tmp_path / name)


def test_a_folder_without_rows_and_a_split_that_is_cut_are_refused(tmp_path):
    (tmp_path / "README.md").write_text("about")
    assert "the folder holds no file of rows (.jsonl" in error(tmp_path)
    assert "'train[:10%]' is cut by the Hub's library alone" in error(tmp_path, "train[:10%]")


def test_a_path_that_is_not_there_is_no_name_of_the_hub(tmp_path):
    assert is_hub_id("org/rows")
    assert not is_hub_id(str(tmp_path))
    for name in ("rows.parquet", "a/b/c", "./rows", "data/x.csv"):
        with pytest.raises(DatasetError, match="no such file or folder"):
            is_hub_id(name)
    assert "the Hub gives no such dataset" in error("org/no-such-rows")

"""The loading of dataset rows from files, the Hub or memory, each with a name for messages.

Text files are read here and not by Arrow, so that a message names file and line, a row keeps
exactly the columns that it has, and a cell of a CSV file stays text ("NA", "007").
"""

from __future__ import annotations

import bz2
import codecs
import csv
import glob
import gzip
import io
import json
import logging
import lzma
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from shared.errors import DatasetError
from student_trainer.data.row_files import (
    ARROW,
    READABLE,
    TABLES,
    files_of,
    format_of,
    is_hub_id,
    is_saved,
)

logger = logging.getLogger(__name__)

Row = tuple[str, dict[str, Any]]

_UNREADABLE = (OSError, EOFError, zlib.error, lzma.LZMAError)


def load_rows(name: str, *, config: str | None, split: str) -> list[Row]:
    """Return the (where, row) pairs of a file, a folder, a glob or a Hub dataset.

    Args:
        name: path of rows as Parquet, Arrow, JSONL, JSON, CSV or TSV, a folder of such files or of
            `save_to_disk`, a glob, or a Hub id.
        config: configuration of a Hub dataset.
        split: split of a Hub dataset, of a saved ``DatasetDict``, or of files named by split.

    Raises:
        DatasetError: rows are missing or unreadable; names the file and the line or row.
    """
    rows = list(iterate_rows(name, config=config, split=split))
    if not rows:
        raise no_rows(name)
    return rows


def no_rows(name: str) -> DatasetError:
    """Return the error of a dataset without rows."""
    return DatasetError(f"{name} holds no rows")


def iterate_rows(
    name: str, *, config: str | None, split: str, streaming: bool = False
) -> Iterator[Row]:
    """Yield the rows that `load_rows` returns, as they are read; there may be none.

    Args:
        streaming: do not download a Hub dataset first.
    """
    yield from checked_text(_iterate(name, config, split, streaming))


def checked_text(rows: Iterable[Row]) -> Iterator[Row]:
    """Yield rows of files, each once its text is seen to be what can be tokenized.

    Raises:
        DatasetError: names a row whose text is not.
    """
    for where, row in rows:
        _check_text(where, row)
        yield where, row


def named_rows(rows: Iterable[Mapping[str, Any]], name: str) -> list[Row]:
    """Return the (where, row) pairs of rows in memory: a list of dicts, or a ``datasets.Dataset``.

    Raises:
        DatasetError: there are no rows, or a row is not a mapping (names it).
    """
    named = list(iterate_named(rows, name))
    if not named:
        raise no_rows(name)
    return named


def iterate_named(rows: Iterable[Mapping[str, Any]], name: str) -> Iterator[Row]:
    """Yield the pairs that `named_rows` returns, one by one."""
    from_arrow = _is_arrow(rows)
    for number, row in enumerate(rows):
        where = f"{name} row {number}"
        if not isinstance(row, Mapping):
            raise DatasetError(
                f"{where}: expected a dict such as {{'prompt': …, 'completion': …}}, "
                f"got {type(row).__name__}"
            )
        made = _without_fillers(dict(row)) if from_arrow else dict(row)
        _check_text(where, made)
        yield where, made


def _is_arrow(rows: Any) -> bool:
    if "datasets" not in sys.modules:  # nobody has imported it, so the rows are not its objects
        return False
    import datasets

    return isinstance(rows, datasets.Dataset | datasets.IterableDataset)


def _iterate(name: str, config: str | None, split: str, streaming: bool) -> Iterator[Row]:
    if is_hub_id(name):
        yield from _read_hub(name, config, split, streaming)
        return
    if "[" in split:
        raise DatasetError(
            f"{name}: a split such as {split!r} is cut by the Hub's library alone; name a whole "
            "split, or write the rows that are wanted to a file"
        )
    path = Path(name).expanduser()
    if is_saved(path):
        yield from _read_saved(path, split)
        return
    files, left_out = files_of(name, split)
    if left_out:
        logger.warning(
            "%s: read are the %d files of the split %s, not %s",
            path, len(files), split, ", ".join(file.name for file in left_out),
        )  # fmt: skip
    yield from read_files(files)


def read_files(files: Iterable[Path]) -> Iterator[Row]:
    """Yield the rows of files one after another, as they are read.

    Raises:
        DatasetError: a file's name tells no format, or a line cannot be read.
    """
    readers = [(file, _reader_of(file)) for file in files]  # every suffix, before any is read
    for file, read in readers:
        yield from read(file)


def _reader_of(path: Path) -> Callable[[Path], Iterator[Row]]:
    suffix = format_of(path)
    if suffix is None:
        raise DatasetError(
            f"{path}: rows are not read from files called so; the name must end in {READABLE}"
        )
    if suffix in ARROW:
        return lambda file: _read_arrow(file, ARROW[suffix])
    if suffix in TABLES:
        return lambda file: _read_table(file, TABLES[suffix])
    return _read_json if suffix == ".json" else _read_jsonl


def _open(path: Path) -> IO[bytes]:
    suffix = path.suffix.lower()
    if suffix == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    openers: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    opened: IO[bytes] = openers.get(suffix, open)(path, "rb")
    return opened


def _decode(where: str, data: bytes) -> str:
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DatasetError(f"{where}: the text is UTF-16; save the file as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DatasetError(
            f"{where}: not UTF-8: byte {error.start + 1} is {data[error.start]:#04x}; save the "
            "file as UTF-8"
        ) from error


def _parse(where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        end = len(text.rstrip("\r\n"))
        place = f"column {min(error.pos, end) + 1}"  # the line is named already
        if "\n" in text.strip():
            place = f"line {error.lineno} column {error.colno}"
        raise DatasetError(f"{where}: not valid JSON: {error.msg} at {place}") from error
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{where}: not valid JSON: {error}") from error


def _read_jsonl(path: Path) -> Iterator[Row]:
    try:
        with _open(path) as file:
            for number, line in enumerate(file, start=1):
                where = f"{path}:{number}"
                if not line.removeprefix(codecs.BOM_UTF8).strip():
                    continue
                text = _decode(where, line) if number == 1 or not line.isascii() else line.decode()
                row = _parse(where, text)
                if not isinstance(row, dict):
                    raise DatasetError(f"{where}: expected a JSON object, got {text.strip()[:40]}")
                yield where, row
    except _UNREADABLE as error:
        raise DatasetError(f"{path}: {_message_of(error)}") from error


def _read_json(path: Path) -> Iterator[Row]:
    """Yield the rows of a JSON array, or of JSON lines, which many ``.json`` files hold.

    Raises:
        DatasetError: it holds neither.
    """
    try:
        with _open(path) as file:
            start = file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()
        rows: list[Any] | None = None
        if start.startswith(b"["):
            with _open(path) as file:
                rows = _parse(str(path), _decode(str(path), file.read()))
    except _UNREADABLE as error:
        raise DatasetError(f"{path}: {_message_of(error)}") from error
    if rows is not None:
        yield from _objects(path, rows)
        return
    try:
        yield from _read_jsonl(path)
    except DatasetError as error:
        if ":1: not valid JSON" in str(error) and start.startswith(b"{"):
            raise DatasetError(
                f"{path} is neither an array of rows nor a row to a line; write "
                "[{…}, {…}], or one object in each line"
            ) from error
        raise


def _objects(path: Path, rows: list[Any]) -> Iterator[Row]:
    for number, row in enumerate(rows):
        where = f"{path} row {number}"
        if not isinstance(row, dict):
            raise DatasetError(f"{where}: expected a JSON object, got {json.dumps(row)[:40]}")
        yield where, row


def _read_table(path: Path, delimiter: str) -> Iterator[Row]:
    """Yield the rows of a CSV or TSV file; an empty cell is None."""
    csv.field_size_limit(sys.maxsize)  # cells may be longer than the library's limit of 128 KiB
    line = 1
    try:
        with io.TextIOWrapper(_open(path), encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter=delimiter, strict=True)
            header = next(reader, None)
            if header is None:
                return
            for name in header:
                if not name.strip() or header.count(name) > 1:
                    raise DatasetError(
                        f"{path}:1: the first line must name each column once; {name!r} is "
                        f"{'empty' if not name.strip() else 'there twice'}"
                    )
            line = reader.line_num + 1
            for cells in reader:
                where, line = f"{path}:{line}", reader.line_num + 1
                if not cells:
                    continue
                if len(cells) != len(header):
                    raise DatasetError(
                        f"{where}: {len(cells)} cells, but {len(header)} columns; put cells with "
                        f"{'a tab' if delimiter != ',' else 'a comma'} or a line break in quotes"
                    )
                yield where, {n: cell or None for n, cell in zip(header, cells, strict=True)}
    except UnicodeDecodeError as error:
        raise DatasetError(
            f"{path}: not UTF-8, at or after line {line}; save the file as UTF-8"
        ) from error
    except csv.Error as error:
        raise DatasetError(f"{path}:{line}: not valid CSV: {error}") from error
    except _UNREADABLE as error:
        raise DatasetError(f"{path}: {_message_of(error)}") from error


def _read_arrow(path: Path, kind: str) -> Iterator[Row]:
    import datasets

    rows = 0
    try:
        dataset = datasets.load_dataset(
            kind, data_files=[glob.escape(str(path))], split="train", streaming=True
        )
        for number, row in enumerate(dataset):
            rows = number + 1
            yield f"{path} row {number}", _without_fillers(dict(row))
    except DatasetError:
        raise
    except Exception as error:  # the library's readers have no common class of errors
        raise DatasetError(
            f"{path}: row {rows} and what follows cannot be read as {kind}: {_message_of(error)}"
        ) from error


def _read_saved(folder: Path, split: str) -> Iterator[Row]:
    import datasets

    try:
        dataset = datasets.load_from_disk(str(folder))
    except Exception as error:  # the library's readers have no common class of errors
        raise DatasetError(
            f"{folder}: what was saved cannot be read: {_message_of(error)}"
        ) from error
    if isinstance(dataset, datasets.DatasetDict):
        if split not in dataset:
            raise DatasetError(
                f"{folder} has no split {split!r}; it has {', '.join(sorted(dataset))}: name one "
                "with --dataset_split, or --eval_dataset_split for held-out rows"
            )
        dataset = dataset[split]
    for number, row in enumerate(dataset):
        yield f"{folder} row {number}", _without_fillers(dict(row))


def _read_hub(name: str, config: str | None, split: str, streaming: bool) -> Iterator[Row]:
    import datasets

    try:
        dataset = datasets.load_dataset(name, config, split=split, streaming=streaming)
    except Exception as error:
        raise DatasetError(
            f"{name} is neither a file nor a folder, and the Hub gives no such dataset: "
            f"{_message_of(error)}"
        ) from error
    for number, row in enumerate(dataset):
        yield f"{name}[{split}] row {number}", _without_fillers(dict(row))


def _message_of(error: BaseException) -> str:
    """Return another library's error as one line."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()) or type(error).__name__


def _without_fillers(row: dict[str, Any]) -> dict[str, Any]:
    """Return the row without the fields of None that Arrow adds where other rows have a field.

    A column that is None stays, and so does a message's content of None.
    """
    return {column: _pruned(value) for column, value in row.items()}


def _pruned(value: Any) -> Any:
    if isinstance(value, list):
        return [_pruned(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        key: _pruned(item)
        for key, item in value.items()
        if item is not None or (key == "content" and "role" in value)
    }


def _check_text(where: str, row: dict[str, Any]) -> None:
    """Refuse half a surrogate pair in any text of a row, because tokenizers cannot encode it.

    Raises:
        DatasetError: names the row, the column and the character.
    """
    for column, value in row.items():
        _check_characters(where, column, value)


def _check_characters(where: str, path: str, value: Any) -> None:
    if isinstance(value, str):
        if value.isascii():
            return
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise DatasetError(
                f"{where}: character {error.start + 1} of {path} is half a surrogate pair "
                f"(\\u{ord(value[error.start]):04x}), which is no text: write the whole character, "
                "or leave it out"
            ) from error
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            _check_characters(where, f"{path}[{number}]", item)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            _check_characters(where, f"a key of {path}", key)
            _check_characters(where, f"{path}.{key}", item)

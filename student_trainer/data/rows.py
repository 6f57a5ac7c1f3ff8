"""The rows of a dataset, from files, the Hub or memory, each with a name for messages."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from shared.errors import DatasetError


def load_rows(name: str, *, config: str | None, split: str) -> list[tuple[str, dict[str, Any]]]:
    """(where, row) pairs of a JSONL file (.gz too), a folder of them, or a Hub dataset.

    Raises:
        DatasetError: missing or empty, or a line that is not a JSON object (file and line).
    """
    path = Path(name).expanduser()
    if path.is_file():
        rows = list(_read_jsonl(path))
    elif path.is_dir():
        files = sorted(p for p in path.iterdir() if p.name.endswith((".jsonl", ".jsonl.gz")))
        rows = [row for file in files for row in _read_jsonl(file)]
    elif path.suffix in (".jsonl", ".json", ".gz") or name.startswith((".", "/", "~")):
        raise DatasetError(
            f"{name}: no such file or folder; give a JSONL file, a folder of them, or a Hub id"
        )
    else:
        rows = _load_from_hub(name, config, split)
    if not rows:
        raise DatasetError(f"{name} holds no rows")
    return rows


def named_rows(rows: Iterable[Mapping[str, Any]], name: str) -> list[tuple[str, dict[str, Any]]]:
    """(where, row) pairs of rows in memory: a list of dicts, or a ``datasets.Dataset``.

    Raises:
        DatasetError: there are none, or one is no mapping (names it).
    """
    named = []
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise DatasetError(
                f"{name} row {number}: expected a dict such as {{'prompt': …, 'completion': …}}, "
                f"got {type(row).__name__}"
            )
        named.append((f"{name} row {number}", dict(row)))
    if not named:
        raise DatasetError(f"{name} holds no rows")
    return named


def _read_jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                where = f"{path}:{number}"
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise DatasetError(f"{where}: not valid JSON: {error}") from error
                if not isinstance(row, dict):
                    raise DatasetError(f"{where}: expected a JSON object, got {line.strip()[:40]}")
                yield where, row
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path}: {error}") from error


def _load_from_hub(name: str, config: str | None, split: str) -> list[tuple[str, dict[str, Any]]]:
    import datasets

    try:
        dataset = datasets.load_dataset(name, config, split=split)
    except Exception as error:
        raise DatasetError(
            f"{name} is neither a file nor a folder, and the Hub gives no such dataset: {error}"
        ) from error
    return [(f"{name}[{split}] row {i}", dict(row)) for i, row in enumerate(dataset)]

"""Measure the store of `--teacher_cache` and bare LMDB: answers a second, and bytes on disk.

LMDB, which is faster but does not survive damage to its file, is left out where it is not
installed. A step reads as many answers as its batch has rows.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import random
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.report import print_report
from student_trainer.teacher.store import AnswerStore

_BATCH = 16  # answers of one request
_BYTES = 40_000  # of an answer: 100 tokens at k = 64

Write = Callable[[Mapping[bytes, bytes]], object]
Read = Callable[[Sequence[bytes]], Sequence[bytes | None]]


def measure(write: Write, read: Read, count: int) -> tuple[float, float]:
    """Return the answers written and found a second, in batches and in different orders."""
    keys = [hashlib.sha256(str(number).encode()).digest() for number in range(count)]
    noise = random.Random(0).randbytes(_BYTES + count)
    records = {key: noise[i : i + _BYTES] for i, key in enumerate(keys)}
    begun = time.perf_counter()
    for first in range(0, count, _BATCH):
        write({key: records[key] for key in keys[first : first + _BATCH]})
    written = count / (time.perf_counter() - begun)
    random.Random(1).shuffle(keys)
    begun = time.perf_counter()
    for first in range(0, count, _BATCH):
        some = keys[first : first + _BATCH]
        if list(read(some)) != [records[key] for key in some]:
            raise AssertionError("the answers found are not those written")
    return written, count / (time.perf_counter() - begun)


def lmdb_calls(folder: Path) -> tuple[Write, Read]:
    """Return functions that write and read LMDB, without checksums, order or bound.

    Raises:
        ImportError: it is not installed.
    """
    lmdb: Any = importlib.import_module("lmdb")
    folder.mkdir()
    env = lmdb.open(str(folder), map_size=8 << 30, metasync=False, readahead=False)

    def write(records: Mapping[bytes, bytes]) -> None:
        with env.begin(write=True) as txn:
            for key, record in records.items():
                txn.put(key, record)

    def read(keys: Sequence[bytes]) -> list[bytes | None]:
        with env.begin() as txn:
            return [txn.get(key) for key in keys]

    return write, read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="800 answers instead of 8,000")
    count = 800 if parser.parse_args().quick else 8_000
    rows: list[tuple[str, float, float, float]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        store = AnswerStore(folder / "sqlite", max_bytes=8 << 30)
        calls: dict[str, tuple[Write, Read]] = {"sqlite": (store.add, store.get)}
        with suppress(ImportError):
            calls["lmdb"] = lmdb_calls(folder / "lmdb")
        for name, (write, read) in calls.items():
            written, found = measure(write, read, count)
            size = sum(file.stat().st_size for file in (folder / name).iterdir())
            rows.append((name, written, found, size / count / _BYTES))
        store.close()
    print_report(
        f"{count} answers of {_BYTES} bytes, {_BATCH} at once",
        ["store", "written/s", "found/s", "bytes on disk a byte"],
        rows,
        {
            f"{name}_{what}": value
            for name, *values in rows
            for what, value in zip(("written", "found", "bytes"), values, strict=True)
        },
        notes=["`found` was written just before: it is in memory, not on a cold disk."],
    )


if __name__ == "__main__":
    main()

"""The store behind `--teacher_cache`: answers a second, and bytes on disk, beside bare LMDB's.

    python -m benchmarks.answer_store --quick

LMDB is what it was before, and is left out where it is not installed: it is faster, and cannot
outlive damage to its file. A step asks for as many answers as its batch has rows.
"""

from __future__ import annotations

import hashlib
import importlib
import random
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.harness import argument_parser, print_report
from student_trainer.teacher.store import AnswerStore

_BATCH = 16  # answers of one request
_BYTES = 40_000  # of an answer: 100 tokens at k = 64

Write = Callable[[Mapping[bytes, bytes]], object]
Read = Callable[[Sequence[bytes]], Sequence[bytes | None]]


def measure(write: Write, read: Read, count: int) -> tuple[float, float]:
    """Return (answers written, answers found) a second; in batches, found in another order."""
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
            raise AssertionError("what was found is not what was written")
    return written, count / (time.perf_counter() - begun)


def lmdb_calls(folder: Path) -> tuple[Write, Read]:
    """Open LMDB without checksums, order or bound; `ImportError` where it is not installed."""
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
    parser = argument_parser(__doc__, quick="800 answers instead of 8,000")
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

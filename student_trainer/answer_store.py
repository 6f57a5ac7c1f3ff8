"""Answers on disk, found by what was asked: shared by ranks and runs, bounded, and checked.

An LMDB environment: readers never wait, a writer that is killed leaves what was committed before,
and its lock passes to the next one. It belongs on a local disk; LMDB's locks and memory map do not
work over network file systems.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from mmap import PAGESIZE
from pathlib import Path

import lmdb

from shared.errors import ConfigurationError, TeacherUnreachableError

logger = logging.getLogger(__name__)

_CHECKSUM_BYTES = 16
# LMDB writes a changed page anew before it gives the old one back, and long records need pages
# that stand together: what is stored stays below this share of the file.
_FILLED = 0.75
_ATTEMPTS = 4
_USES_AT_ONCE = 1024


class AnswerStore:
    """Records under keys; the first one under a key stands. Safe in threads and processes.

    Args:
        folder: made where it does not exist. A process opens it once at a time.
        max_bytes: largest size of the file. Where a record would not fit, those go whose last use
            is longest ago. Where it is smaller than the file, that is what is stored in it: a file
            does not shrink.

    Attributes:
        corrupt: records found so far whose checksum was wrong.

    Raises:
        ConfigurationError: the folder cannot be used, or holds something else.
    """

    def __init__(self, folder: str | Path, *, max_bytes: int) -> None:
        pages = max(max_bytes // PAGESIZE, 64)
        self.corrupt = 0
        self._limit = int(_FILLED * pages) * PAGESIZE
        self._lock = threading.Lock()
        self._closed = False
        self._full = False
        self._used: dict[bytes, None] = {}  # since the last transaction that wrote
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            file = Path(folder) / "data.mdb"
            size = file.stat().st_size if file.exists() else 0
            if size > pages * PAGESIZE:  # of a run that stored more; throwing out takes pages too
                pages = size // PAGESIZE * 9 // 8
            # Without metasync a power cut may undo the last commits; it breaks nothing.
            self._env = lmdb.open(
                str(folder),
                map_size=pages * PAGESIZE,
                max_dbs=4,
                metasync=False,
                readahead=False,
            )
            self._env.reader_check()  # readers that were killed keep pages from being used again
            self._records = self._env.open_db(b"records")  # key -> checksum, record
            self._order = self._env.open_db(b"order")  # number of its last use -> key
            self._numbers = self._env.open_db(b"numbers")  # key -> number of its last use
            self._notes = self._env.open_db(b"notes")
        except (OSError, lmdb.Error) as error:
            raise ConfigurationError(
                f"--teacher_cache {folder} cannot be used ({error}): give a folder of its own on a "
                "local disk, or delete it to begin anew"
            ) from error

    def close(self) -> None:
        """Note what was used, and close."""
        self._note_uses()
        with self._lock:
            self._closed = True
            self._env.close()

    def get(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """The record of each key; None where there is none, or not the one that was written."""
        found: list[bytes | None] = []
        with self._transaction() as txn:
            for key in keys:
                try:
                    stored = txn.get(key, db=self._records)
                except (lmdb.CorruptedError, lmdb.PageNotFoundError):
                    stored = b""
                record = None if stored is None else _checked(key, bytes(stored))
                found.append(record)
                if record is not None:
                    self._used[key] = None
                elif stored is not None:
                    self.corrupt += 1
                    logger.warning("A corrupt answer in the teacher cache is asked for anew")
        if len(self._used) >= _USES_AT_ONCE:
            self._note_uses()
        return found

    def count(self, keys: Sequence[bytes]) -> int:
        """How many of the keys have a record, unread."""
        found = 0
        with self._transaction() as txn:
            for key in keys:
                with suppress(lmdb.CorruptedError, lmdb.PageNotFoundError):  # as good as missing
                    found += txn.get(key, db=self._records) is not None
        return found

    def add(self, records: Mapping[bytes, bytes]) -> dict[bytes, bytes]:
        """Store records; returns what stands under each key from now on.

        That is another process's where it came first, so that all learn from the same answer. A
        corrupt one is replaced. What cannot be stored stands for this call alone.
        """
        wanted = sum(_size(record) for record in records.values())
        if wanted > self._limit // _ATTEMPTS:
            logger.warning(
                "%d answers of %d bytes are not stored: --teacher_cache_max_gb is too small",
                len(records), wanted,
            )  # fmt: skip
            return dict(records)
        for attempt in range(_ATTEMPTS):
            try:
                # More each time: pages are free only after the transaction behind the next one.
                self._make_room((1 + attempt) * wanted)
                return self._put(records)
            except lmdb.MapFullError:
                self._env.reader_check()
            except lmdb.Error as error:
                logger.warning("The teacher cache takes no more: %s", error)
                break
        else:
            logger.warning("The teacher cache has no room for %d bytes in one piece", wanted)
        return dict(records)

    def note(self, name: str, value: bytes) -> None:
        """Keep a value that is never thrown out, where there is room for it.

        Without it answers are found all the same; only a run without a teacher does not know whose.
        """
        try:
            with self._transaction(write=True) as txn:
                txn.put(name.encode(), value, db=self._notes)
        except lmdb.Error as error:
            logger.warning("The teacher cache could not note which teacher %s is: %s", name, error)

    def notes(self) -> dict[str, bytes]:
        with self._transaction() as txn:
            items = txn.cursor(db=self._notes).iternext()
            return {bytes(name).decode(): bytes(value) for name, value in items}

    def _put(self, records: Mapping[bytes, bytes]) -> dict[bytes, bytes]:
        standing: dict[bytes, bytes] = {}
        with self._transaction(write=True) as txn:
            for key, record in records.items():
                stored = txn.get(key, db=self._records)
                before = None if stored is None else _checked(key, bytes(stored))
                if before is None:
                    txn.put(key, _checksum(key, record) + record, db=self._records)
                standing[key] = record if before is None else before
                self._mark_used(txn, key)
        return standing

    def _make_room(self, wanted: int) -> None:
        """Throw out what was not used for longest, until ``wanted`` bytes fit."""
        self._note_uses()
        with self._transaction() as txn:
            if self._size(txn) + wanted <= self._limit:
                return
        if not self._full:
            self._full = True
            logger.warning(
                "The teacher cache is full: what was used longest ago makes room for new answers. "
                "Raise --teacher_cache_max_gb to keep all"
            )
        with self._transaction(write=True) as txn:
            oldest = txn.cursor(db=self._order)
            while self._size(txn) + wanted > self._limit and oldest.first():
                key = bytes(oldest.value())
                oldest.delete()
                txn.delete(key, db=self._numbers)
                txn.delete(key, db=self._records)

    def _size(self, txn: lmdb.Transaction) -> int:
        """Bytes of the pages that hold something."""
        stats = [txn.stat(db) for db in (self._records, self._order, self._numbers)]
        return PAGESIZE * sum(
            stat["branch_pages"] + stat["leaf_pages"] + stat["overflow_pages"] for stat in stats
        )

    def _note_uses(self) -> None:
        if not self._used:
            return
        try:
            with self._transaction(write=True) as txn:
                for key in self._used:
                    if txn.get(key, db=self._numbers) is not None:  # not thrown out meanwhile
                        self._mark_used(txn, key)
                self._used.clear()
        except lmdb.Error as error:
            logger.warning("The teacher cache could not note what was used: %s", error)

    def _mark_used(self, txn: lmdb.Transaction, key: bytes) -> None:
        before = txn.get(key, db=self._numbers)
        if before is not None:
            txn.delete(before, db=self._order)
        last = txn.cursor(db=self._order)
        number = int.from_bytes(last.key(), "big") + 1 if last.last() else 0
        stamp = number.to_bytes(8, "big")
        txn.put(stamp, key, db=self._order)
        txn.put(key, stamp, db=self._numbers)

    @contextmanager
    def _transaction(self, *, write: bool = False) -> Iterator[lmdb.Transaction]:
        with self._lock:
            if self._closed:
                raise TeacherUnreachableError("the teacher cache is closed")
            try:
                txn = self._env.begin(write=write)
            except lmdb.MapResizedError:  # by a process that may store more
                self._env.set_mapsize(0)
                txn = self._env.begin(write=write)
            with txn:
                yield txn


def _checksum(key: bytes, record: bytes) -> bytes:
    return hashlib.blake2b(record, key=key[:64], digest_size=_CHECKSUM_BYTES).digest()


def _checked(key: bytes, stored: bytes) -> bytes | None:
    """The record without its checksum; None where that is wrong."""
    record = stored[_CHECKSUM_BYTES:]
    return record if stored[:_CHECKSUM_BYTES] == _checksum(key, record) else None


def _size(record: bytes) -> int:
    """Bytes of the pages that a record takes at most, its part of the indices included."""
    return (len(record) // PAGESIZE + 2) * PAGESIZE

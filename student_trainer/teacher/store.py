"""The store of a teacher's answers on disk, shared by ranks and runs, of bounded size.

It is an SQLite database in a folder, whose file may be damaged in any way, before a run or during
it. Each record has a checksum, and a record that does not match it counts as missing. A database
that cannot be read is set aside, and a new one is started. The file is never mapped into memory
(hence no write-ahead log, whose index is), so that damage is an error and not a SIGBUS. It belongs
on a local disk: SQLite's locks do not work over every network file system.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from shared.errors import ConfigurationError, TeacherUnreachableError
from student_trainer.teacher.database import (
    PAGE,
    checked,
    checksum,
    corrupt_entries,
    entry_id,
    file_number,
    filled_pages,
    is_damage,
    mark_used,
    newest_number,
    open_database,
    pages,
    put_note,
    read_stored,
    remove,
    transaction,
)

logger = logging.getLogger(__name__)

R = TypeVar("R")

_FEWEST_PAGES = 64
_SHARE = 4  # the records of one call may fill this part (1/4) of the size limit
_USES_AT_ONCE = 1024
_OLDEST_AT_ONCE = 64


class AnswerStore:
    """A store of records by key, which keeps the first one; safe in threads and processes.

    Args:
        folder: created if it does not exist.
        max_bytes: largest size of the file. Least recently used records are deleted to make room.
            It limits what is stored in a file that is larger already, because files do not shrink.

    Attributes:
        corrupt: number of records found so far that do not match their checksum.

    Raises:
        ConfigurationError: the folder cannot be used.
    """

    def __init__(self, folder: str | Path, *, max_bytes: int) -> None:
        self.corrupt = self._told_corrupt = 0
        self._folder = Path(folder)
        self._limit = max(max_bytes // PAGE, _FEWEST_PAGES)  # pages
        self._lock = threading.Lock()
        self._closed = False
        self._warned: set[str] = set()
        self._used: dict[bytes, None] = {}  # keys read since the last transaction that wrote
        self._db: sqlite3.Connection | None = None
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self.file_number = newest_number(self._folder) or 1
            try:
                self._db = open_database(self._file)
            except sqlite3.Error as error:
                if not is_damage(error):
                    raise
                self._set_aside(error)
            if self._db is None:
                raise OSError("it takes no new file")
        except (OSError, sqlite3.Error) as error:
            raise ConfigurationError(
                f"--teacher_cache {folder} cannot be used ({error}): give a folder of its own on a "
                "local disk that can be written to"
            ) from error
        if (self._folder / "data.mdb").exists():
            logger.warning(
                "--teacher_cache %s holds an LMDB cache of an earlier version, which is not read: "
                "delete data.mdb and lock.mdb; its answers are requested anew",
                folder,
            )

    @property
    def _file(self) -> Path:
        return self._folder / f"answers-{self.file_number}.sqlite"

    def close(self) -> None:
        """Write the keys used last, and close the database."""
        with self._lock:
            if not self._closed:
                self._note_uses()
            self._closed = True
            self._disconnect()

    def get(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """Return the record of each key; None where it is missing or corrupt."""
        with self._lock:
            found = self._try(lambda db: [self._record(db, key) for key in keys], write=False)
            if len(self._used) >= _USES_AT_ONCE:
                self._note_uses()
        return [None] * len(keys) if found is None else found

    def count(self, keys: Sequence[bytes]) -> int:
        """Count the keys that have a record, without reading it."""
        with self._lock:
            found = self._try(
                lambda db: sum(entry_id(db, key) is not None for key in keys), write=False
            )
        return found or 0

    def add(self, records: Mapping[bytes, bytes]) -> dict[bytes, bytes]:
        """Store records, and return the record that is kept under each key.

        It is another process's if that was first, so that all learn from the same answer. A corrupt
        record is replaced. A record that cannot be stored is returned for this call only.
        """
        wanted = sum(map(pages, records.values()))
        if wanted > self._limit // _SHARE:
            logger.warning(
                "%d answers of %d bytes are not stored: --teacher_cache_max_gb is too small",
                len(records), wanted * PAGE,
            )  # fmt: skip
            return dict(records)
        with self._lock:
            bad = self._try(lambda db: corrupt_entries(db, records), write=False) or {}
            standing = self._try(lambda db: self._insert(db, records, bad, wanted))
        return dict(records) if standing is None else standing

    def reject(self, records: Mapping[bytes, bytes]) -> None:
        """Delete and count corrupt records whose checksum is right."""
        with self._lock:
            for _ in records:
                self._count_corrupt()
            self._try(lambda db: remove(db, records))

    def note(self, name: str, value: bytes) -> None:
        """Store a value that is never deleted to make room, if there is room for it.

        Answers are found without it; only a run without a teacher needs to know whose they are.
        """
        stored = checksum(name.encode(), value) + value
        with self._lock:
            if self._try(lambda db: put_note(db, name, stored)) is None:
                logger.warning("The teacher cache could not note which teacher %s is", name)

    def notes(self) -> dict[str, bytes]:
        """Return the values of `note` by name, without corrupt ones."""
        with self._lock:
            return self._try(self._read_notes, write=False) or {}

    def take_corrupt(self) -> int:
        """Return the number of corrupt records found since the last call."""
        with self._lock:
            new, self._told_corrupt = self.corrupt - self._told_corrupt, self.corrupt
        return new

    # The methods below are called with the lock held.

    def _try(self, work: Callable[[sqlite3.Connection], R], *, write: bool = True) -> R | None:
        """Return ``work(db)`` of a transaction; None if nothing can be read or stored.

        A damaged database is set aside, and ``work`` is done in a new one.

        Raises:
            TeacherUnreachableError: the store is closed.
        """
        if self._closed:
            raise TeacherUnreachableError("the teacher cache is closed")
        for _ in range(2):
            if write:
                self._follow_newer_file()
            if self._db is None:
                return None
            try:
                with transaction(self._db, write):
                    return work(self._db)
            except (sqlite3.Error, MemoryError) as error:
                if not is_damage(error):
                    self._warn_once(
                        "takes no more" if write else "cannot be read",
                        f"({str(error) or type(error).__name__}): answers that are not kept are "
                        "requested again",
                    )
                    return None
                self._set_aside(error)
        return None

    def _follow_newer_file(self) -> None:
        """Open the database that another process has started since, if there is one."""
        newest = newest_number(self._folder)
        if newest is not None and newest > self.file_number:
            self._begin(newest)

    def _set_aside(self, error: Exception) -> None:
        number, damaged = self.file_number, self._file
        self._begin(max(number + 1, newest_number(self._folder) or 0))
        logger.warning(
            "The teacher cache %s cannot be read (%s) and is set aside; answers are kept in %s "
            "from now on. Delete the first to have its room",
            damaged, error, self._file.name,
        )  # fmt: skip
        for file in self._folder.glob(
            "answers-*.sqlite"
        ):  # older damaged files go, or a bad disk fills up
            if (file_number(file) or number) < number:
                with suppress(OSError):
                    file.unlink()

    def _begin(self, number: int) -> None:
        self._disconnect()
        self.file_number = number
        self._used.clear()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._db = open_database(self._file)
        except (OSError, sqlite3.Error) as error:
            logger.warning("%s cannot be used (%s): answers are not kept", self._file, error)

    def _disconnect(self) -> None:
        if self._db is not None:
            with suppress(sqlite3.Error):
                self._db.close()
        self._db = None

    def _record(self, db: sqlite3.Connection, key: bytes) -> bytes | None:
        number = entry_id(db, key)
        if number is None:
            return None
        record = checked(key, read_stored(db, number))
        if record is None:
            self._count_corrupt()
        else:
            self._used[key] = None
        return record

    def _read_notes(self, db: sqlite3.Connection) -> dict[str, bytes]:
        notes: dict[str, bytes] = {}
        for name, stored in db.execute("SELECT name, stored FROM notes").fetchall():
            right = isinstance(name, str) and isinstance(stored, bytes)
            value = checked(name.encode(), stored) if right else None
            if value is None:
                self._count_corrupt()
            else:
                notes[name] = value
        return notes

    def _count_corrupt(self) -> None:
        self.corrupt += 1
        self._warn_once(
            "holds an answer that is not what was written",
            "and is requested anew; teacher_cache_corrupt counts further ones",
        )

    def _warn_once(self, what: str, more: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            logger.warning("The teacher cache %s %s", what, more)

    def _insert(
        self,
        db: sqlite3.Connection,
        records: Mapping[bytes, bytes],
        bad: Mapping[bytes, int],
        wanted: int,
    ) -> dict[bytes, bytes]:
        mark_used(db, self._used)
        self._make_room(db, wanted)
        standing: dict[bytes, bytes] = {}
        for key, record in records.items():
            number = entry_id(db, key)
            before = None
            if number is not None and bad.get(key) != number:
                before = checked(key, read_stored(db, number))
            if before is None:  # a corrupt record's pages are kept, as they may be another record's
                new = db.execute(
                    "INSERT INTO records (stored) VALUES (?)", (checksum(key, record) + record,)
                ).lastrowid
                db.execute("INSERT OR REPLACE INTO entries VALUES (?, ?, 0)", (key, new))
            standing[key] = record if before is None else before
        mark_used(db, standing)
        self._used.clear()
        return standing

    def _make_room(self, db: sqlite3.Connection, wanted: int) -> None:
        """Delete the least recently used records until ``wanted`` pages fit."""
        while filled_pages(db) + wanted > self._limit:
            self._warn_once(
                "is full:",
                "what was used longest ago makes room for new answers. Raise "
                "--teacher_cache_max_gb to keep all",
            )
            oldest = db.execute(
                "SELECT key, id FROM entries ORDER BY used LIMIT ?", (_OLDEST_AT_ONCE,)
            ).fetchall()
            for key, number in oldest:
                db.execute("DELETE FROM records WHERE id = ?", (number,))
                if db.execute("DELETE FROM entries WHERE key = ?", (key,)).rowcount != 1:
                    raise sqlite3.DatabaseError("an entry of its index is nowhere else")
                if filled_pages(db) + wanted <= self._limit:
                    break
            if not oldest:
                raise sqlite3.DatabaseError("it is full of nothing")

    def _note_uses(self) -> None:
        if self._used:
            self._try(lambda db: mark_used(db, self._used))
            self._used.clear()

"""The store of a teacher's answers on disk, shared by ranks and runs, of bounded size.

It is an SQLite database in a folder, whose file may be damaged in any way, before a run or during
it. Each record has a checksum, and a record that does not match it counts as missing. A database
that cannot be read is set aside, and a new one is started. The file is never mapped into memory
(hence no write-ahead log, whose index is), so that damage is an error and not a SIGBUS. It belongs
on a local disk: SQLite's locks do not work over every network file system.
"""

from __future__ import annotations

import hashlib
import logging
import re
import sqlite3
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from shared.errors import ConfigurationError, TeacherUnreachableError

logger = logging.getLogger(__name__)

R = TypeVar("R")

_APPLICATION = 0x73676B64  # "sgkd", SQLite's application_id of these files
_CHECKSUM_BYTES = 16
_PAGE = 4096
_OVERFLOW = _PAGE - 4  # bytes of a long record on each page
_FEWEST_PAGES = 64
_SHARE = 4  # the records of one call may fill this part (1/4) of the size limit
_WAIT_SECONDS = 60.0  # to wait for another process's transaction
_USES_AT_ONCE = 1024
_OLDEST_AT_ONCE = 64

# `entries` is small and points to each record, so that a record that cannot be read is replaced
# without touching its pages.
_SCHEMA = """
CREATE TABLE entries (key BLOB PRIMARY KEY, id INTEGER, used INTEGER) WITHOUT ROWID;
CREATE INDEX by_use ON entries (used);
CREATE TABLE records (id INTEGER PRIMARY KEY, stored BLOB);
CREATE TABLE notes (name TEXT PRIMARY KEY, stored BLOB) WITHOUT ROWID;
"""
_PRAGMAS = (
    "mmap_size = 0",
    "journal_mode = TRUNCATE",
    "synchronous = NORMAL",
    "secure_delete = OFF",
    "cell_size_check = ON",
    "trusted_schema = OFF",
)
# The statements of this module are correct, so these errors mean that the file is damaged.
_DAMAGE = {
    sqlite3.SQLITE_ERROR, sqlite3.SQLITE_INTERNAL, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_SCHEMA,
    sqlite3.SQLITE_TOOBIG, sqlite3.SQLITE_CONSTRAINT, sqlite3.SQLITE_MISMATCH,
    sqlite3.SQLITE_FORMAT, sqlite3.SQLITE_RANGE, sqlite3.SQLITE_NOTADB,
}  # fmt: skip
_DAMAGE_IN_DETAIL = {
    sqlite3.SQLITE_IOERR_READ,
    sqlite3.SQLITE_IOERR_SHORT_READ,
    sqlite3.SQLITE_IOERR_CORRUPTFS,
    sqlite3.SQLITE_READONLY_DBMOVED,  # the file was removed during the run
}


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
        self.corrupt = 0
        self._folder = Path(folder)
        self._limit = max(max_bytes // _PAGE, _FEWEST_PAGES)  # pages
        self._lock = threading.Lock()
        self._closed = False
        self._warned: set[str] = set()
        self._used: dict[bytes, None] = {}  # keys read since the last transaction that wrote
        self._db: sqlite3.Connection | None = None
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._file_number = _newest_number(self._folder) or 1
            try:
                self._db = _open_database(self._file)
            except sqlite3.Error as error:
                if not _is_damage(error):
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
                "delete data.mdb and lock.mdb; its answers are asked for anew",
                folder,
            )

    @property
    def _file(self) -> Path:
        return self._folder / f"answers-{self._file_number}.sqlite"

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
                lambda db: sum(_entry_id(db, key) is not None for key in keys), write=False
            )
        return found or 0

    def add(self, records: Mapping[bytes, bytes]) -> dict[bytes, bytes]:
        """Store records, and return the record that is kept under each key.

        It is another process's if that was first, so that all learn from the same answer. A corrupt
        record is replaced. A record that cannot be stored is returned for this call only.
        """
        wanted = sum(map(_pages, records.values()))
        if wanted > self._limit // _SHARE:
            logger.warning(
                "%d answers of %d bytes are not stored: --teacher_cache_max_gb is too small",
                len(records), wanted * _PAGE,
            )  # fmt: skip
            return dict(records)
        with self._lock:
            bad = self._try(lambda db: _corrupt_entries(db, records), write=False) or {}
            standing = self._try(lambda db: self._insert(db, records, bad, wanted))
        return dict(records) if standing is None else standing

    def reject(self, records: Mapping[bytes, bytes]) -> None:
        """Delete and count corrupt records whose checksum is right."""
        with self._lock:
            for _ in records:
                self._count_corrupt()
            self._try(lambda db: _remove(db, records))

    def note(self, name: str, value: bytes) -> None:
        """Store a value that is never deleted to make room, if there is room for it.

        Answers are found without it; only a run without a teacher needs to know whose they are.
        """
        stored = _checksum(name.encode(), value) + value
        with self._lock:
            if self._try(lambda db: _put_note(db, name, stored)) is None:
                logger.warning("The teacher cache could not note which teacher %s is", name)

    def notes(self) -> dict[str, bytes]:
        """Return the values of `note` by name, without corrupt ones."""
        with self._lock:
            return self._try(self._read_notes, write=False) or {}

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
                with _transaction(self._db, write):
                    return work(self._db)
            except (sqlite3.Error, MemoryError) as error:
                if not _is_damage(error):
                    self._warn_once(
                        "takes no more" if write else "cannot be read",
                        f"({str(error) or type(error).__name__}): answers that are not kept are "
                        "asked for again",
                    )
                    return None
                self._set_aside(error)
        return None

    def _follow_newer_file(self) -> None:
        """Open the database that another process has started since, if there is one."""
        newest = _newest_number(self._folder)
        if newest is not None and newest > self._file_number:
            self._begin(newest)

    def _set_aside(self, error: Exception) -> None:
        number, damaged = self._file_number, self._file
        self._begin(max(number + 1, _newest_number(self._folder) or 0))
        logger.warning(
            "The teacher cache %s cannot be read (%s) and is set aside; answers are kept in %s "
            "from now on. Delete the first to have its room",
            damaged, error, self._file.name,
        )  # fmt: skip
        for file in self._folder.glob(
            "answers-*.sqlite"
        ):  # older damaged files go, or a bad disk fills up
            if (_file_number(file) or number) < number:
                with suppress(OSError):
                    file.unlink()

    def _begin(self, number: int) -> None:
        self._disconnect()
        self._file_number = number
        self._used.clear()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._db = _open_database(self._file)
        except (OSError, sqlite3.Error) as error:
            logger.warning("%s cannot be used (%s): answers are not kept", self._file, error)

    def _disconnect(self) -> None:
        if self._db is not None:
            with suppress(sqlite3.Error):
                self._db.close()
        self._db = None

    def _record(self, db: sqlite3.Connection, key: bytes) -> bytes | None:
        number = _entry_id(db, key)
        if number is None:
            return None
        record = _checked(key, _read_stored(db, number))
        if record is None:
            self._count_corrupt()
        else:
            self._used[key] = None
        return record

    def _read_notes(self, db: sqlite3.Connection) -> dict[str, bytes]:
        notes: dict[str, bytes] = {}
        for name, stored in db.execute("SELECT name, stored FROM notes").fetchall():
            right = isinstance(name, str) and isinstance(stored, bytes)
            value = _checked(name.encode(), stored) if right else None
            if value is None:
                self._count_corrupt()
            else:
                notes[name] = value
        return notes

    def _count_corrupt(self) -> None:
        self.corrupt += 1
        self._warn_once(
            "holds an answer that is not what was written",
            "and is asked for anew; teacher_cache_corrupt counts further ones",
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
        _mark_used(db, self._used)
        self._make_room(db, wanted)
        standing: dict[bytes, bytes] = {}
        for key, record in records.items():
            number = _entry_id(db, key)
            before = None
            if number is not None and bad.get(key) != number:
                before = _checked(key, _read_stored(db, number))
            if before is None:  # a corrupt record's pages are kept, as they may be another record's
                new = db.execute(
                    "INSERT INTO records (stored) VALUES (?)", (_checksum(key, record) + record,)
                ).lastrowid
                db.execute("INSERT OR REPLACE INTO entries VALUES (?, ?, 0)", (key, new))
            standing[key] = record if before is None else before
        _mark_used(db, standing)
        self._used.clear()
        return standing

    def _make_room(self, db: sqlite3.Connection, wanted: int) -> None:
        """Delete the least recently used records until ``wanted`` pages fit."""
        while _filled_pages(db) + wanted > self._limit:
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
                if _filled_pages(db) + wanted <= self._limit:
                    break
            if not oldest:
                raise sqlite3.DatabaseError("it is full of nothing")

    def _note_uses(self) -> None:
        if self._used:
            self._try(lambda db: _mark_used(db, self._used))
            self._used.clear()


def _open_database(file: Path) -> sqlite3.Connection:
    """Return a connection to the database in a file, which is created if it does not exist.

    Raises:
        sqlite3.Error: it cannot be read, or is another program's.
    """
    db = sqlite3.connect(file, timeout=_WAIT_SECONDS, isolation_level=None, check_same_thread=False)
    try:
        db.execute(f"PRAGMA page_size = {_PAGE}")
        for pragma in _PRAGMAS:
            db.execute(f"PRAGMA {pragma}")
        with _transaction(db, write=True):
            if _pragma(db, "schema_version") == 0:
                for statement in _SCHEMA.strip().split("\n"):
                    db.execute(statement)
                db.execute(f"PRAGMA application_id = {_APPLICATION}")
            if _pragma(db, "application_id") != _APPLICATION or _pragma(db, "page_size") != _PAGE:
                raise sqlite3.DatabaseError("it is another program's")
    except BaseException:
        db.close()
        raise
    return db


@contextmanager
def _transaction(db: sqlite3.Connection, write: bool) -> Iterator[None]:
    db.execute("BEGIN IMMEDIATE" if write else "BEGIN")
    try:
        yield
        if write:
            db.execute("COMMIT")
    finally:
        if db.in_transaction:
            with suppress(sqlite3.Error):
                db.execute("ROLLBACK")


def _is_damage(error: Exception) -> bool:
    """Return whether an error is due to the file's content, not a full disk, a lock or rights."""
    if isinstance(error, MemoryError):  # the machine may be short of memory
        return False
    code = getattr(error, "sqlite_errorcode", None)
    if code is None:  # undecodable text, or an error raised in this module
        return True
    return code & 0xFF in _DAMAGE or code in _DAMAGE_IN_DETAIL


def _newest_number(folder: Path) -> int | None:
    """Return the number of the newest database file, which is the one in use; None without one."""
    return max(filter(None, map(_file_number, folder.glob("answers-*.sqlite"))), default=None)


def _file_number(file: Path) -> int | None:
    match = re.fullmatch(r"answers-([1-9]\d{0,8})\.sqlite", file.name)
    return int(match[1]) if match else None


def _pragma(db: sqlite3.Connection, name: str) -> int:
    """Return a number in the file's header.

    Raises:
        sqlite3.DatabaseError: it is not a number.
    """
    (value,) = db.execute(f"PRAGMA {name}").fetchone()
    if not isinstance(value, int):
        raise sqlite3.DatabaseError(f"{name} is {value!r:.60}")
    return value


def _filled_pages(db: sqlite3.Connection) -> int:
    """Return the number of pages in use.

    Raises:
        sqlite3.DatabaseError: the file's counts contradict each other.
    """
    pages, free = _pragma(db, "page_count"), _pragma(db, "freelist_count")
    if not 0 <= free < pages:
        raise sqlite3.DatabaseError(f"{free} of {pages} pages are free")
    return pages - free


def _entry_id(db: sqlite3.Connection, key: bytes) -> int | None:
    row = db.execute("SELECT id FROM entries WHERE key = ?", (key,)).fetchone()
    return None if row is None else row[0]


def _read_stored(db: sqlite3.Connection, number: int) -> bytes | None:
    """Return a record with its checksum; None if it cannot be read."""
    try:
        row = db.execute("SELECT stored FROM records WHERE id = ?", (number,)).fetchone()
    except (sqlite3.Error, MemoryError) as error:
        if not _is_damage(error):
            raise
        return None
    return row[0] if row is not None and isinstance(row[0], bytes) else None


def _corrupt_entries(db: sqlite3.Connection, keys: Mapping[bytes, object]) -> dict[bytes, int]:
    """Return the ids of corrupt records by key.

    This runs before a transaction that writes, because SQLite aborts one in which it finds damage.
    """
    bad: dict[bytes, int] = {}
    for key in keys:
        number = _entry_id(db, key)
        if number is not None and _checked(key, _read_stored(db, number)) is None:
            bad[key] = number
    return bad


def _remove(db: sqlite3.Connection, records: Mapping[bytes, bytes]) -> None:
    for key, record in records.items():
        number = _entry_id(db, key)
        if number is not None and _checked(key, _read_stored(db, number)) == record:
            db.execute("DELETE FROM records WHERE id = ?", (number,))
            db.execute("DELETE FROM entries WHERE key = ?", (key,))


def _mark_used(db: sqlite3.Connection, keys: Mapping[bytes, object]) -> None:
    (last,) = db.execute("SELECT max(used) FROM entries").fetchone()
    if last is not None and not (isinstance(last, int) and 0 <= last < 1 << 62):
        raise sqlite3.DatabaseError(f"the last use is {last!r:.60}")
    stamps = enumerate(keys, 1 + (last or 0))
    db.executemany("UPDATE entries SET used = ? WHERE key = ?", stamps)


def _put_note(db: sqlite3.Connection, name: str, stored: bytes) -> bool:
    db.execute("INSERT OR REPLACE INTO notes VALUES (?, ?)", (name, stored))
    return True


def _checksum(key: bytes, record: bytes) -> bytes:
    key = hashlib.sha256(key).digest()  # blake2b takes no longer keys
    return hashlib.blake2b(record, key=key, digest_size=_CHECKSUM_BYTES).digest()


def _checked(key: bytes, stored: bytes | None) -> bytes | None:
    """Return the record without its checksum; None if that is wrong."""
    if stored is None:
        return None
    record = stored[_CHECKSUM_BYTES:]
    return record if stored[:_CHECKSUM_BYTES] == _checksum(key, record) else None


def _pages(record: bytes) -> int:
    """Return the most pages that a record uses, with its part of the indices."""
    return len(record) // _OVERFLOW + 3

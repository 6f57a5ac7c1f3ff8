"""The database of a teacher's answers: its tables, its damage, and each read and write.

Every function takes an open connection and may raise `sqlite3.Error`; `is_damage` tells whether the
file is to blame.
"""

from __future__ import annotations

import hashlib
import re
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

_APPLICATION = 0x73676B64  # "sgkd", SQLite's application_id of these files
_CHECKSUM_BYTES = 16
PAGE = 4096
_OVERFLOW = PAGE - 4  # bytes of a long record on each page
_WAIT_SECONDS = 60.0  # to wait for another process's transaction
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
# The statements here and in `store` are correct, so these errors mean that the file is damaged.
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


def open_database(file: Path) -> sqlite3.Connection:
    """Return a connection to the database in a file, which is created if it does not exist.

    Raises:
        sqlite3.Error: it cannot be read, or is another program's.
    """
    db = sqlite3.connect(file, timeout=_WAIT_SECONDS, isolation_level=None, check_same_thread=False)
    try:
        db.execute(f"PRAGMA page_size = {PAGE}")
        for pragma in _PRAGMAS:
            db.execute(f"PRAGMA {pragma}")
        with transaction(db, write=True):
            if _pragma(db, "schema_version") == 0:
                for statement in _SCHEMA.strip().split("\n"):
                    db.execute(statement)
                db.execute(f"PRAGMA application_id = {_APPLICATION}")
            if _pragma(db, "application_id") != _APPLICATION or _pragma(db, "page_size") != PAGE:
                raise sqlite3.DatabaseError("it is another program's")
    except BaseException:
        db.close()
        raise
    return db


@contextmanager
def transaction(db: sqlite3.Connection, write: bool) -> Iterator[None]:
    db.execute("BEGIN IMMEDIATE" if write else "BEGIN")
    try:
        yield
        if write:
            db.execute("COMMIT")
    finally:
        if db.in_transaction:
            with suppress(sqlite3.Error):
                db.execute("ROLLBACK")


def is_damage(error: Exception) -> bool:
    """Return whether an error is due to the file's content, not a full disk, a lock or rights."""
    if isinstance(error, MemoryError):  # the machine may be short of memory
        return False
    code = getattr(error, "sqlite_errorcode", None)
    if code is None:  # undecodable text, or an error that this module or `store` raises
        return True
    return code & 0xFF in _DAMAGE or code in _DAMAGE_IN_DETAIL


def newest_number(folder: Path) -> int | None:
    """Return the number of the newest database file, which is the one in use; None without one."""
    return max(filter(None, map(file_number, folder.glob("answers-*.sqlite"))), default=None)


def file_number(file: Path) -> int | None:
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


def filled_pages(db: sqlite3.Connection) -> int:
    """Return the number of pages in use.

    Raises:
        sqlite3.DatabaseError: the file's counts contradict each other.
    """
    pages, free = _pragma(db, "page_count"), _pragma(db, "freelist_count")
    if not 0 <= free < pages:
        raise sqlite3.DatabaseError(f"{free} of {pages} pages are free")
    return pages - free


def entry_id(db: sqlite3.Connection, key: bytes) -> int | None:
    row = db.execute("SELECT id FROM entries WHERE key = ?", (key,)).fetchone()
    return None if row is None else row[0]


def read_stored(db: sqlite3.Connection, number: int) -> bytes | None:
    """Return a record with its checksum; None if it cannot be read."""
    try:
        row = db.execute("SELECT stored FROM records WHERE id = ?", (number,)).fetchone()
    except (sqlite3.Error, MemoryError) as error:
        if not is_damage(error):
            raise
        return None
    return row[0] if row is not None and isinstance(row[0], bytes) else None


def corrupt_entries(db: sqlite3.Connection, keys: Mapping[bytes, object]) -> dict[bytes, int]:
    """Return the ids of corrupt records by key.

    This runs before a transaction that writes, because SQLite aborts one in which it finds damage.
    """
    bad: dict[bytes, int] = {}
    for key in keys:
        number = entry_id(db, key)
        if number is not None and checked(key, read_stored(db, number)) is None:
            bad[key] = number
    return bad


def remove(db: sqlite3.Connection, records: Mapping[bytes, bytes]) -> None:
    for key, record in records.items():
        number = entry_id(db, key)
        if number is not None and checked(key, read_stored(db, number)) == record:
            db.execute("DELETE FROM records WHERE id = ?", (number,))
            db.execute("DELETE FROM entries WHERE key = ?", (key,))


def mark_used(db: sqlite3.Connection, keys: Mapping[bytes, object]) -> None:
    (last,) = db.execute("SELECT max(used) FROM entries").fetchone()
    if last is not None and not (isinstance(last, int) and 0 <= last < 1 << 62):
        raise sqlite3.DatabaseError(f"the last use is {last!r:.60}")
    stamps = enumerate(keys, 1 + (last or 0))
    db.executemany("UPDATE entries SET used = ? WHERE key = ?", stamps)


def put_note(db: sqlite3.Connection, name: str, stored: bytes) -> bool:
    db.execute("INSERT OR REPLACE INTO notes VALUES (?, ?)", (name, stored))
    return True


def checksum(key: bytes, record: bytes) -> bytes:
    key = hashlib.sha256(key).digest()  # blake2b takes no longer keys
    return hashlib.blake2b(record, key=key, digest_size=_CHECKSUM_BYTES).digest()


def checked(key: bytes, stored: bytes | None) -> bytes | None:
    """Return the record without its checksum; None if that is wrong."""
    if stored is None:
        return None
    record = stored[_CHECKSUM_BYTES:]
    return record if stored[:_CHECKSUM_BYTES] == checksum(key, record) else None


def pages(record: bytes) -> int:
    """Return the most pages that a record uses, with its part of the indices."""
    return len(record) // _OVERFLOW + 3

"""Functions that damage a teacher cache."""

import sqlite3
from collections.abc import Callable
from pathlib import Path


def database(folder: Path) -> Path:
    """Return the file of a closed store that has never been damaged."""
    (file,) = folder.glob("answers-*.sqlite")
    return file


def rewritten(folder: Path, change: Callable[[bytes], bytes], *, all: bool = False) -> int:
    """Change the first record of a closed store, or all of them, with valid checksums."""
    with sqlite3.connect(database(folder)) as db:
        found = db.execute("SELECT id, stored FROM records ORDER BY id").fetchall()
        found = found if all else found[:1]
        for number, stored in found:
            db.execute("UPDATE records SET stored = ? WHERE id = ?", (change(stored), number))
    db.close()
    return len(found)


def corrupt_one_record(folder: Path) -> None:
    """Flip a bit of the first answer where it lies in the file of a closed store."""
    with sqlite3.connect(database(folder)) as db:
        (written,) = db.execute("SELECT stored FROM records ORDER BY id LIMIT 1").fetchone()
    db.close()
    data = bytearray(database(folder).read_bytes())
    place, copies = data.find(written), 0
    while place >= 0:  # pages that were written anew leave older copies behind
        data[place + len(written) // 2] ^= 0x01
        place, copies = data.find(written), copies + 1
    assert copies
    database(folder).write_bytes(data)

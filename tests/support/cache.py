"""Damage to a teacher cache."""

from pathlib import Path

import lmdb


def corrupt_one_record(folder: Path) -> None:
    """Flip a bit of the first answer where it lies in the file of a closed store."""
    with lmdb.open(str(folder), max_dbs=4) as env, env.begin() as txn:
        cursor = txn.cursor(db=env.open_db(b"records", txn=txn))
        assert cursor.first()
        written = bytes(cursor.value())
    file = folder / "data.mdb"
    data = bytearray(file.read_bytes())
    place, copies = data.find(written), 0
    while place >= 0:  # pages that were written anew leave older copies behind
        data[place + len(written) // 2] ^= 0x01
        place, copies = data.find(written), copies + 1
    assert copies
    file.write_bytes(data)

"""A teacher cache that is cut, overwritten or removed, before a run or during it.

Damage may cost answers, which are requested anew. It never ends the process, and what is found is
what was written. Each test damages a file of its own in a process of its own, which a signal such
as SIGBUS would end.
"""

import hashlib
import logging
import os
import random
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from student_trainer.teacher.store import AnswerStore

MIB = 1 << 20
COUNT = 200
FILE = "answers-1.sqlite"


def key(number):
    return hashlib.sha256(str(number).encode()).digest()


def record(number):
    return random.Random(number).randbytes(100 if number % 4 == 0 else 20_000)


def opened(folder):
    return AnswerStore(folder, max_bytes=64 * MIB)


def fill(store, numbers):
    for first in range(0, len(numbers), 50):
        some = {key(number): record(number) for number in numbers[first : first + 50]}
        assert store.add(some) == some


def found(store):
    """Return how many records are there; each must be the one that was written."""
    records = store.get([key(number) for number in range(COUNT)])
    for number, value in enumerate(records):
        assert value in (None, record(number))
    return sum(value is not None for value in records)


def used(folder):
    """Do with a store all that a run does; returns how many records there were at first."""
    store = opened(folder)
    there = found(store)
    assert store.notes() in ({}, {"http://teacher": b"who"})
    store.count([key(number) for number in range(COUNT)])
    fill(store, range(COUNT))
    assert found(store) == COUNT  # all that was lost is there again
    store.note("http://teacher", b"who")
    assert store.notes() == {"http://teacher": b"who"}
    store.close()
    store = opened(folder)
    assert found(store) == COUNT
    store.close()
    return there


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    store = opened(folder)
    fill(store, range(COUNT))
    store.note("http://teacher", b"who")
    store.close()
    return folder


def outlived(function, *arguments):
    """Call one of this module's functions in a process of its own; returns what it prints."""
    call = (
        f"import sys; from tests.faults.test_damaged_cache import {function} as use;"
        " use(*sys.argv[1:])"
    )
    done = subprocess.run(
        [sys.executable, "-c", call, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def copied(whole, folder):
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole, folder)
    return folder / FILE


def use_what_was_cut(whole, folder):
    size = (Path(whole) / FILE).stat().st_size
    for cut in (0, 1, 100, 4096, 8192, size // 4, size // 2 + 17, size - 4096, size - 1):
        os.truncate(copied(Path(whole), Path(folder)), cut)
        used(Path(folder))


def test_a_file_that_was_cut_is_done_without(whole, tmp_path):
    outlived("use_what_was_cut", whole, tmp_path / "cut")


def cut_what_is_used(whole, folder):
    for cut in (0, 100, 4096, 500_000):
        file = copied(Path(whole), Path(folder))
        store = opened(folder)
        assert found(store) == COUNT
        os.truncate(file, cut)
        found(store)
        fill(store, range(COUNT))
        assert found(store) == COUNT
        store.close()


def test_a_file_that_is_cut_during_a_run_is_done_without(whole, tmp_path):
    outlived("cut_what_is_used", whole, tmp_path / "cut")


def use_overwritten_pages(whole, folder):
    rng = random.Random(2)
    pages = (Path(whole) / FILE).stat().st_size // 4096
    for case in range(40):
        file = copied(Path(whole), Path(folder))
        with file.open("r+b") as damaged:
            for _ in range(1 + case % 8):
                damaged.seek(4096 * rng.randrange(pages))
                damaged.write(rng.choice([rng.randbytes(4096), bytes(4096), b"\xff" * 4096]))
        sys.stdout.write(f"{used(Path(folder))}\n")


def test_overwritten_pages_cost_little(whole, tmp_path):
    there = list(map(int, outlived("use_overwritten_pages", whole, tmp_path / "pages")))
    assert len(there) == 40
    assert max(there) < COUNT
    assert sorted(there)[len(there) // 4] > 0.9 * COUNT  # a page that holds the index costs all


def use_flipped_bits(whole, folder):
    rng = random.Random(3)
    for _ in range(12):
        file = copied(Path(whole), Path(folder))
        data = bytearray(file.read_bytes())
        for _ in range(64):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        for _ in range(4):  # where the structure is: the head, and the first pages of each table
            data[rng.randrange(5 * 4096)] ^= 1 << rng.randrange(8)
        file.write_bytes(data)
        used(Path(folder))


def test_flipped_bits_never_become_an_answer(whole, tmp_path):
    outlived("use_flipped_bits", whole, tmp_path / "bits")


@pytest.mark.parametrize("what", ["file", "folder"])
def test_what_is_removed_during_a_run_is_begun_anew(whole, tmp_path, what):
    file = copied(whole, tmp_path / "removed")
    store = opened(tmp_path / "removed")
    assert found(store) == COUNT
    if what == "file":
        file.unlink()
    else:
        shutil.rmtree(tmp_path / "removed")
    fill(store, [0, 1])
    assert store.get([key(0), key(1)]) == [record(0), record(1)]
    store.close()
    store = opened(tmp_path / "removed")
    assert store.get([key(0), key(1)]) == [record(0), record(1)]
    store.close()


def test_what_cannot_be_read_is_set_aside_and_told_once(tmp_path, caplog):
    (tmp_path / FILE).write_bytes(b"something else" * 1000)
    with caplog.at_level(logging.WARNING):
        store = opened(tmp_path)
        fill(store, [0])
        store.close()
        store = opened(tmp_path)
        assert store.get([key(0)]) == [record(0)]
        store.close()
    (told,) = caplog.messages
    assert f"{tmp_path / FILE} cannot be read (file is not a database) and is set aside" in told
    assert (tmp_path / FILE).read_bytes() == b"something else" * 1000
    # The next one too; of what was set aside only the last stays, or a bad disk would fill up.
    (tmp_path / "answers-2.sqlite").write_bytes(b"something else" * 1000)
    opened(tmp_path).close()
    names = {path.name for path in tmp_path.glob("*.sqlite")}
    assert names == {"answers-2.sqlite", "answers-3.sqlite"}


def test_others_follow_to_the_next_database(whole, tmp_path):
    file = copied(whole, tmp_path / "cache")
    one, other = opened(tmp_path / "cache"), opened(tmp_path / "cache")
    assert found(one) == found(other) == COUNT
    with file.open("r+b") as damaged:
        damaged.write(bytes(4096))
    fill(one, [0, 1])
    assert other.add({key(0): b"later"}) == {key(0): record(0)}
    assert other.get([key(1)]) == [record(1)]
    one.close()
    other.close()


def test_another_programs_database_is_set_aside(tmp_path):
    with sqlite3.connect(tmp_path / FILE) as db:
        db.execute("CREATE TABLE entries (mine)")
    db.close()
    store = opened(tmp_path)
    fill(store, [0])
    assert store.get([key(0)]) == [record(0)]
    store.close()
    with sqlite3.connect(tmp_path / FILE) as db:
        assert db.execute("SELECT name FROM sqlite_schema").fetchall() == [("entries",)]
    db.close()

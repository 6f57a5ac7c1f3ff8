"""The store on its own: what it keeps, what it throws out, and what it survives."""

import hashlib
import multiprocessing
import os
import random
import resource
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time

import pytest

from shared.errors import ConfigurationError, TeacherUnreachableError
from student_trainer.teacher.store import AnswerStore
from tests.support.cache import database

MIB = 1 << 20


def key(name):
    return hashlib.sha256(str(name).encode()).digest()


def record(name, size=3000):
    """Bytes that the name alone decides."""
    return random.Random(str(name)).randbytes(size)


def opened(folder, max_bytes=8 * MIB):
    return AnswerStore(folder, max_bytes=max_bytes)


def fill(store, names, size=3000):
    for name in names:
        store.add({key(name): record(name, size)})


def kept(store, names, size=3000):
    """The names whose record is there; each of them must be the one that was written."""
    found = dict(zip(names, store.get([key(name) for name in names]), strict=True))
    for name, value in found.items():
        assert value in (None, record(name, size))
    return [name for name, value in found.items() if value is not None]


def test_records_are_there_when_the_store_is_opened_again(tmp_path):
    store = opened(tmp_path / "new" / "folder")
    fill(store, range(5), size=100)
    store.note("a", b"1")
    store.close()
    store = opened(tmp_path / "new" / "folder")
    assert kept(store, range(6), size=100) == [0, 1, 2, 3, 4]
    assert store.count([key(0), key("other")]) == 1
    assert store.notes() == {"a": b"1"}
    store.close()


def test_a_lack_of_memory_costs_answers_and_not_the_cache(tmp_path, monkeypatch, caplog):
    store = opened(tmp_path)
    fill(store, range(3))

    def starved(*_):
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr("student_trainer.teacher.store.transaction", starved)
        assert kept(store, range(3)) == []
    assert kept(store, range(3)) == [0, 1, 2]
    assert "cannot be read (MemoryError)" in caplog.text
    store.close()


def test_a_disk_that_takes_no_more_costs_answers_and_notes_but_not_the_run(tmp_path, caplog):
    """By the limit of a file's size, which is met in the middle of a write, as a full disk."""
    store = opened(tmp_path)
    fill(store, range(3))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (database(tmp_path).stat().st_size, limits[1]))
    try:
        for name in range(40):
            store.note(f"http://teacher-{name}", bytes(4000))
        fill(store, range(3, 60))
        assert store.count([key(name) for name in range(3)]) == 3
        assert kept(store, range(3)) == [0, 1, 2]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        store.close()
    assert "could not note which teacher http://teacher-39 is" in caplog.text
    assert "takes no more" in caplog.text


def test_the_first_record_under_a_key_stands_and_is_told(tmp_path):
    store = opened(tmp_path)
    assert store.add({key(1): b"first"}) == {key(1): b"first"}
    assert store.add({key(1): b"second", key(2): b"new"}) == {key(1): b"first", key(2): b"new"}
    assert store.get([key(1)]) == [b"first"]
    store.close()


@pytest.mark.parametrize("size", [200, 30_000])
def test_a_record_with_flipped_bytes_in_the_file_is_missing_and_counted_and_replaced(
    tmp_path, size
):
    store = opened(tmp_path)
    fill(store, range(3), size)
    store.close()
    file = database(tmp_path)
    data = bytearray(file.read_bytes())
    places = [data.find(record(1, size)[-50:])]
    while (more := data.find(record(1, size)[-50:], places[-1] + 1)) >= 0:
        places.append(more)  # pages that were written anew leave older copies behind
    for place in places:
        data[place + 10] ^= 0x01
    file.write_bytes(data)

    store = opened(tmp_path)
    assert kept(store, range(3), size) == [0, 2]
    assert store.corrupt == 1
    assert store.add({key(1): record(1, size)}) == {key(1): record(1, size)}
    assert kept(store, range(3), size) == [0, 1, 2]
    assert store.corrupt == 1
    store.close()


def test_a_record_under_another_ones_key_is_corrupt(tmp_path):
    store = opened(tmp_path)
    fill(store, range(2))
    store.close()
    with sqlite3.connect(database(tmp_path)) as db:
        (other,) = db.execute("SELECT id FROM entries WHERE key = ?", (key(1),)).fetchone()
        db.execute("UPDATE entries SET id = ? WHERE key = ?", (other, key(0)))
    db.close()
    store = opened(tmp_path)
    assert store.get([key(0)]) == [None]
    assert store.corrupt == 1
    store.close()


def test_the_file_stays_within_its_bound_whatever_the_sizes(tmp_path):
    store = opened(tmp_path, 4 * MIB)
    rng = random.Random(0)
    for number in range(300):
        sizes = [rng.choice([300, 3_000, 20_000, 90_000]) for _ in range(4)]
        new = {key((number, i)): record((number, i), size) for i, size in enumerate(sizes)}
        assert store.add(new) == new
        assert store.get(list(new)) == list(new.values())  # the last ones are always there
    assert 2 * MIB < database(tmp_path).stat().st_size <= 4 * MIB
    store.close()


def test_what_was_used_longest_ago_goes_first(tmp_path, caplog):
    store = opened(tmp_path, 2 * MIB)
    fill(store, range(40), 30_000)
    assert kept(store, [0, 1, 2], 30_000) == [0, 1, 2]  # used again
    store.close()  # remembered over runs
    store = opened(tmp_path, 2 * MIB)
    fill(store, range(40, 80), 30_000)
    remaining = kept(store, range(80), 30_000)
    assert remaining[:3] == [0, 1, 2]
    assert remaining[3:] == list(range(80 - len(remaining) + 3, 80))
    assert 40 < len(remaining) < 79
    assert caplog.text.count("is full") == 1
    store.close()


def test_a_smaller_bound_is_kept_by_the_next_run(tmp_path):
    store = opened(tmp_path, 8 * MIB)
    fill(store, range(200), 20_000)
    assert len(kept(store, range(200), 20_000)) == 200
    store.close()
    store = opened(tmp_path, 2 * MIB)
    fill(store, ["new"], 20_000)
    remaining = kept(store, range(200), 20_000)
    assert 0 < len(remaining) <= 2 * MIB // 20_000
    assert remaining[-1] == 199
    assert kept(store, ["new"], 20_000) == ["new"]
    store.close()


def test_what_is_larger_than_the_bound_allows_is_not_stored_and_throws_nothing_out(
    tmp_path, caplog
):
    store = opened(tmp_path, 2 * MIB)
    fill(store, range(10))
    large = {key("large"): record("large", MIB)}
    assert store.add(large) == large
    assert "--teacher_cache_max_gb is too small" in caplog.text
    assert kept(store, [*range(10), "large"]) == list(range(10))
    store.close()


def test_a_closed_store_says_so(tmp_path):
    store = opened(tmp_path)
    store.close()
    with pytest.raises(TeacherUnreachableError, match="closed"):
        store.get([key(1)])


def test_a_folder_that_cannot_be_used_is_refused(tmp_path):
    (tmp_path / "file").write_bytes(b"something else")
    with pytest.raises(ConfigurationError, match=r"--teacher_cache .* cannot be used"):
        opened(tmp_path / "file")
    (tmp_path / "taken" / "answers-1.sqlite").mkdir(parents=True)
    with pytest.raises(ConfigurationError, match=r"--teacher_cache .* cannot be used"):
        opened(tmp_path / "taken")


def test_a_cache_of_an_earlier_version_is_left_alone_and_told(tmp_path, caplog):
    (tmp_path / "data.mdb").write_bytes(b"of LMDB")
    store = opened(tmp_path)
    fill(store, range(3))
    assert kept(store, range(3)) == [0, 1, 2]
    store.close()
    assert "delete data.mdb and lock.mdb" in caplog.text
    assert (tmp_path / "data.mdb").read_bytes() == b"of LMDB"


def _write(folder, names, max_bytes, size=3000):
    store = opened(folder, max_bytes)
    for first in range(0, len(names), 4):
        store.add({key(name): record(name, size) for name in names[first : first + 4]})
        assert kept(store, names[first : first + 4], size) == names[first : first + 4]
    store.close()


def in_processes(*calls):
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_write, args=arguments) for arguments in calls]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(120)
        assert writer.exitcode == 0


def test_two_processes_write_at_once(tmp_path):
    store = opened(tmp_path)
    in_processes(*((tmp_path, list(range(first, first + 600)), 8 * MIB) for first in (0, 300)))
    assert kept(store, range(900)) == list(range(900))
    assert store.corrupt == 0
    store.close()


def test_a_process_that_may_store_more_does_not_disturb_this_one(tmp_path):
    store = opened(tmp_path, 2 * MIB)
    in_processes((tmp_path, list(range(400)), 32 * MIB, 20_000))
    assert database(tmp_path).stat().st_size > 7 * MIB  # beyond its own bound
    assert kept(store, range(400), 20_000) == list(range(400))
    store.close()


WRITER = textwrap.dedent("""
    import itertools, sys
    from tests.unit.student_trainer.teacher.test_store import MIB, fill, opened

    store = opened(sys.argv[1], 4 * MIB)  # small, so that it throws out too
    for number in itertools.count(int(sys.argv[2])):
        fill(store, [number], 3000 + number % 7 * 10_000)
        print(number, flush=True)
""")


def test_a_writer_killed_at_any_moment_leaves_all_that_it_had_stored(tmp_path):
    rng = random.Random(1)
    first = 0
    for _ in range(12):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), str(first)], stdout=subprocess.PIPE
        )
        seen = [writer.stdout.readline() for _ in range(rng.randint(5, 12))]
        time.sleep(rng.uniform(0.0, 0.01))
        os.kill(writer.pid, signal.SIGKILL)
        told = b"".join([*seen, writer.stdout.read()]).split()
        writer.wait()
        last = int(told[-1])
        store = opened(tmp_path, 4 * MIB)
        for number in range(max(first, last - 10), last + 1):
            assert kept(store, [number], 3000 + number % 7 * 10_000) == [number]
        assert store.corrupt == 0
        store.close()
        first = last + 1
    assert first > 50  # wrote something in between

"""Messages as records of a store, each checked when it is read."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias, TypeVar

from pydantic import BaseModel

from shared import wire
from shared.errors import ProtocolError, TeacherAnswerError
from student_trainer.teacher.store import AnswerStore

M = TypeVar("M", bound=BaseModel)

# Returns the checked answer that a record under a key holds, or raises one of `UNUSABLE`.
Reader: TypeAlias = Callable[[bytes, bytes], M]

UNUSABLE = (ProtocolError, TeacherAnswerError)
_MAX_BYTES = 1 << 30


class CheckedRecords:
    """The records of a store as messages; a record that its reader refuses counts as missing."""

    def __init__(self, store: AnswerStore) -> None:
        self._store = store
        self._counting = threading.Lock()
        self._looked_up = self._found = 0

    def take_lookups(self) -> tuple[int, int, int]:
        """Return (lookups, answers found, corrupt answers) since the last call."""
        with self._counting:
            taken = self._looked_up, self._found, self._store.take_corrupt()
            self._looked_up = self._found = 0
        return taken

    def look_up(self, keys: Sequence[bytes], read: Reader[M]) -> dict[bytes, M]:
        """Return the stored answers by key, and count lookups and answers."""
        found = self.read(keys, read)
        with self._counting:
            self._looked_up += len(keys)
            self._found += sum(key in found for key in keys)
        return found

    def read(self, keys: Sequence[bytes], read: Reader[M]) -> dict[bytes, M]:
        """Return the stored answers by key, and remove records that are no such answer."""
        different = list(dict.fromkeys(keys))
        records = zip(different, self._store.get(different), strict=True)
        return self._read_records({key: r for key, r in records if r is not None}, read)

    def add(self, new: Mapping[bytes, M], read: Reader[M]) -> dict[bytes, M]:
        """Store answers, and return those kept: another process's where that was first."""
        records = {key: dump(message) for key, message in new.items()}
        standing = self._store.add(records)
        others = {key: record for key, record in standing.items() if record != records[key]}
        return {**new, **self._read_records(others, read)}

    def _read_records(self, records: Mapping[bytes, bytes], read: Reader[M]) -> dict[bytes, M]:
        found: dict[bytes, M] = {}
        bad: dict[bytes, bytes] = {}
        for key, record in records.items():
            try:
                found[key] = read(key, record)
            except UNUSABLE:
                bad[key] = record
        if bad:
            self._store.reject(bad)
        return found


def dump(message: BaseModel) -> bytes:
    """Return the record of a message."""
    return wire.dump(message, wire.MSGPACK_MEDIA_TYPE)


def load(kind: type[M], record: bytes) -> M:
    """Return the message in a record.

    Raises:
        ProtocolError: it holds no such message.
    """
    return wire.load(kind, record, wire.MSGPACK_MEDIA_TYPE, max_bytes=_MAX_BYTES)

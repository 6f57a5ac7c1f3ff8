"""Read the JSON files of runs, and read them again only where they have changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from shared.errors import DatasetError

T = TypeVar("T")
Convert = Callable[[dict[str, Any]], dict[str, Any]]

# Modification time in nanoseconds, size in bytes and inode: what changes when a file is written.
_Stamp = tuple[int, int, int]
_CHECKED = 4096  # last bytes of a known part, by which it is recognized


@dataclass
class _Appended:
    """The known part of a file that grows: the lines of its first ``size`` bytes.

    Attributes:
        end: the last of these bytes. If they changed, the file was written anew.
    """

    lines: list[dict[str, Any]]
    size: int
    end: bytes


class Files:
    """A reader of files that remembers what it has read.

    Attributes:
        reads: how often a file was read, in whole or in part. It stays where nothing has changed.
    """

    def __init__(self) -> None:
        self.reads = 0
        self._known: dict[Path, tuple[_Stamp, Any]] = {}
        self._appended: dict[Path, _Appended] = {}

    def json(self, path: Path, convert: Convert = dict) -> dict[str, Any]:
        """Return the object in a file, converted when it is read.

        Raises:
            DatasetError: it is not JSON, as while it is being written.
        """
        return self._once(path, lambda: convert(_parsed(path, path.read_text(encoding="utf-8"))))

    def json_lines(self, path: Path) -> list[dict[str, Any]]:
        """Return the objects in the lines of a file; none where it is missing.

        Raises:
            DatasetError: a line is not JSON.
        """
        if not path.exists():
            return []
        return self._once(path, lambda: _parsed_lines(path, path.read_text(encoding="utf-8")))

    def appended_lines(self, path: Path, convert: Convert = dict) -> list[dict[str, Any]]:
        """Return the objects in the whole lines of a file that grows; only what is new is read.

        A file that was written anew is read from its beginning.

        Args:
            convert: is called with each object once.

        Raises:
            DatasetError: a line is not JSON.
        """
        return self._once(path, lambda: self._grown(path, convert))

    def _once(self, path: Path, read: Callable[[], T]) -> T:
        status = path.stat()
        stamp = status.st_mtime_ns, status.st_size, status.st_ino
        known = self._known.get(path)
        if known is None or known[0] != stamp:
            self.reads += 1
            known = self._known[path] = stamp, read()
        value: T = known[1]
        return value

    def _grown(self, path: Path, convert: Convert) -> list[dict[str, Any]]:
        with path.open("rb") as file:
            known = self._appended.get(path, _Appended([], 0, b""))
            file.seek(known.size - len(known.end))
            if file.read(len(known.end)) != known.end:
                known = _Appended([], 0, b"")
                file.seek(0)
            whole, newline, _ = file.read().rpartition(b"\n")  # the last may be half written
        new = whole + newline
        lines = [*known.lines, *map(convert, _parsed_lines(path, new.decode()))]
        end = (known.end + new)[-_CHECKED:]
        self._appended[path] = _Appended(lines, known.size + len(new), end)
        return lines


def _parsed(path: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise DatasetError(f"{path}: not valid JSON: {error}") from error


def _parsed_lines(path: Path, text: str) -> list[dict[str, Any]]:
    return [_parsed(path, line) for line in text.split("\n") if line]

"""Keep the completions of an unfinished evaluation, so that an interrupted one can go on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self


class EvaluationJournal:
    """A file of completions by number, under a first line that identifies the evaluation.

    Completions of the same evaluation are read into ``texts`` and ``truncated``; those of another
    one are dropped, and the file begins anew. A last line that was cut is left out and written
    again. Use as a context manager.

    Args:
        path: of the file.
        of: model, problems and sampling, as JSON.
    """

    def __init__(self, path: Path, of: Mapping[str, Any]) -> None:
        self.path = path
        self.texts: dict[int, str] = {}
        self.truncated: dict[int, bool] = {}
        first = json.dumps(of, sort_keys=True)
        lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
        if lines[:1] == [first]:
            for number, text, truncated in map(json.loads, lines[1:]):
                self.texts[number], self.truncated[number] = text, truncated
        else:
            lines = [first]
        part = path.with_name(path.name + ".part")
        part.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        part.replace(path)
        self._file = path.open("a", encoding="utf-8")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()

    def add(self, number: int, text: str, *, truncated: bool) -> None:
        """Write a completion at once, and whether the length limit cut it."""
        self.texts[number], self.truncated[number] = text, truncated
        self._file.write(json.dumps([number, text, truncated]) + "\n")
        self._file.flush()

    def finish(self) -> None:
        """Delete the file, when all results are written elsewhere."""
        self.path.unlink()

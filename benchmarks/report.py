"""The output of every benchmark: a table for people and, as the last line, one line of JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

Cell = str | int | float
Figure = str | int | float | bool | None


def format_table(columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """Return an aligned table: the first column to the left, others to the right, floats to .001.

    Raises:
        ValueError: a row with another number of cells than there are columns.
    """
    for row in rows:
        if len(row) != len(columns):
            raise ValueError(f"the row {list(row)} has {len(row)} cells for {len(columns)} columns")
    texts = [list(columns)] + [[_text(cell) for cell in row] for row in rows]
    widths = [max(len(line[column]) for line in texts) for column in range(len(columns))]
    lines = [
        "  ".join(
            [line[0].ljust(widths[0])]
            + [text.rjust(width) for text, width in zip(line[1:], widths[1:], strict=True)]
        ).rstrip()
        for line in texts
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def print_report(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[Cell]],
    figures: Mapping[str, Figure],
    *,
    notes: Sequence[str] = (),
) -> None:
    """Print title, table and notes, and then ``figures`` as the last line, in JSON.

    Raises:
        ValueError: a figure is NaN or infinite, which JSON does not have.
    """
    last = json.dumps(dict(figures), allow_nan=False)
    print(f"{title}\n\n{format_table(columns, rows)}\n")
    for note in notes:
        print(note)
    print(last, flush=True)


def _text(cell: Cell) -> str:
    return f"{cell:.3f}" if isinstance(cell, float) else str(cell)

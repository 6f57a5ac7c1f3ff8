"""The content of the page: charts, tables, samples."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from student_trainer.reporting.axes import format_number
from student_trainer.reporting.svg import Point

Better = Literal["lower", "higher", ""]
Verdict = Literal["better", "worse", "chance"]


@dataclass(frozen=True)
class Chart:
    """A chart of lines, name -> (x, y) points.

    Attributes:
        words: what is drawn, with the terms that a newcomer does not know.
        note: one or two sentences on what to do, where it is not good.
        better: the direction that is good, "" where neither is.
        share: y is a share, written in percent.
        numbers: name -> the number of its colour, as `draw_lines` takes it; default: their order.
    """

    title: str
    y_label: str
    series: Mapping[str, Sequence[Point]]
    x_label: str = "step"
    words: str = ""
    note: str = ""
    better: Better = ""
    share: bool = False
    numbers: Mapping[str, int] | None = None

    @property
    def advice(self) -> str:
        """The direction that is good, and what to do where it is not."""
        direction = f"{self.better.capitalize()} is better. " if self.better else ""
        return direction + self.note

    def constant(self) -> str:
        """Return what is to be said of lines that never change; "" where one does."""
        lines = {
            name: [(x, y) for x, y in line if math.isfinite(y)]
            for name, line in self.series.items()
        }
        lines = {name: line for name, line in lines.items() if line}
        firsts = {name: line[0][1] for name, line in lines.items()}
        if not lines or any(y != firsts[name] for name, line in lines.items() for _, y in line):
            return ""
        values = {name: format_number(y, share=self.share) for name, y in firsts.items()}
        places = {x for line in lines.values() for x, _ in line}
        known = "constant"
        if len(places) == 1:
            known = f"logged once, at {self.x_label} {max(places):,.0f}"
        if len(set(values.values())) == 1:
            return f"{known}: {next(iter(values.values()))}"
        return f"{known}: " + ", ".join(f"{name} {value}" for name, value in values.items())


@dataclass(frozen=True)
class Range:
    """A value with its interval, written and drawn on the scale of its column."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Delta:
    """An interval of a difference, written, and drawn against 0.

    Attributes:
        verdict: "better" or "worse" beyond chance, or "chance".
    """

    text: str
    low: float
    high: float
    verdict: Verdict


Cell = str | Range | Delta


@dataclass(frozen=True)
class Table:
    """A header and rows of text and intervals; the row of index ``best`` is highlighted.

    Attributes:
        numbers: of the colour of each row's run; None for a row without a run.
        note: a sentence below.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    best: int | None = None
    numbers: Sequence[int | None] = ()
    note: str = ""


@dataclass(frozen=True)
class SideBySide:
    """A prompt, its reference ("" if unknown), and what each model wrote.

    Attributes:
        completions: name -> (text, right or wrong).
        shaded: name -> the tokens of one text, with the divergence of that model from its teacher.
        numbers: name -> the number of the colour of its run, of those that are of a run.
    """

    prompt: str
    reference: str
    completions: Mapping[str, tuple[str, bool]]
    shaded: Mapping[str, Sequence[Token]] = field(default_factory=dict)
    numbers: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Token:
    """A token of a text, and the divergence of two distributions at its position.

    Attributes:
        divergence: nats.
        support: (token, the teacher's probability or None if unknown, the student's).
    """

    text: str
    divergence: float
    support: Sequence[tuple[str, float | None, float]]


@dataclass(frozen=True)
class Samples:
    """Samples under a heading.

    Attributes:
        note: how they were chosen, and what all of them say that are not shown.
    """

    title: str
    note: str
    cards: Sequence[SideBySide]


@dataclass(frozen=True)
class Report:
    """The content of the page, top to bottom.

    Attributes:
        title: of the page.
        lead: paragraphs under it: what was done, what to look at first.
        note: how to read the page, in small print.
        tables: comparisons, by title ("" for none).
        charts: curves.
        seconds: run -> part -> seconds, drawn as one bar a part.
        samples: completions side by side.
        commands: how to repeat the run.
        numbers: run of ``seconds`` -> the number of its colour; default: their order.
        status: a line of what the runs are doing now.
    """

    title: str
    lead: Sequence[str]
    tables: Mapping[str, Table]
    charts: Sequence[Chart] = ()
    seconds: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    samples: Sequence[Samples] = ()
    commands: Sequence[str] = ()
    numbers: Mapping[str, int] | None = None
    status: str = ""
    note: str = ""

"""Write a study's results.json, results.md, and a plot for each comparison."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from student_trainer.reporting.statistics import Estimate, estimate, paired_difference
from student_trainer.reporting.svg import Interval, write_interval_chart, write_interval_rows
from student_trainer.study.spec import Study, Table

# Cell -> seed -> value; the seed is None for a cell that runs once for all seeds.
Values = Mapping[str, Mapping[int | None, float]]
# Metric -> its values; the study's own metric comes first.
Measured = Mapping[str, Values]


def write_report(study: Study, measured: Measured, seconds: float, folder: Path) -> list[Path]:
    """Write the report of the cells that are measured so far.

    Args:
        measured: metric -> cell -> seed -> value; cells and seeds that are not done are left out.
        seconds: that all jobs took.

    Returns:
        The files written.
    """
    results, text = folder / "results.json", folder / "results.md"
    results.write_text(json.dumps(_results(study, measured, seconds), indent=2) + "\n")
    sections = [f"# {study.title}\n", _NOTE.format(metric=", ".join(study.metrics()))]
    plots = []
    for table in study.tables:
        values = measured[table.metric]
        if any(name in values for name in table.cells):
            plot = folder / f"{table.name}.svg"
            _plot(study, table, values, plot)
            plots.append(plot)
            sections += [_section(table, values), f"\n![{table.title}]({plot.name})\n"]
    text.write_text("\n".join(sections))
    return [results, text, *plots]


_NOTE = """\
{metric}: mean over seeds ± half the 95 % interval (Student's t). Differences are taken seed by
seed; "no" says that the interval holds 0. Each interval is of one comparison: among twenty, one is
expected to miss.
"""


def _results(study: Study, measured: Measured, seconds: float) -> dict[str, Any]:
    others = {name: _cells(values) for name, values in measured.items() if name != study.metric}
    return {
        "title": study.title,
        "metric": study.metric,
        "seconds": round(seconds, 1),
        "cells": _cells(measured[study.metric]),
        **({"other_metrics": others} if others else {}),
        "differences": {
            table.name: [
                {"cell": cell, "base": base, **_numbers(found)}
                for cell, base, found in _differences(table, measured[table.metric])
            ]
            for table in study.tables
        },
    }


def _cells(values: Values) -> dict[str, Any]:
    return {
        name: {"values": {"all" if seed is None else str(seed): v for seed, v in seeds.items()}}
        | _numbers(estimate(list(seeds.values())))
        for name, seeds in values.items()
    }


def _numbers(found: Estimate) -> dict[str, Any]:
    interval = None
    if found.margin is not None:
        interval = [round(found.mean - found.margin, 6), round(found.mean + found.margin, 6)]
    return {"mean": round(found.mean, 6), "interval": interval, "n": found.n}


def _differences(table: Table, values: Values) -> list[tuple[str, str, Estimate]]:
    return [
        (cell, base, found)
        for cell, base in table.differences
        if (found := paired_difference(values.get(cell, {}), values.get(base, {}))) is not None
    ]


def _section(table: Table, values: Values) -> str:
    lines = [f"## {table.title}\n", f"| cell | {table.metric} | seeds |", "| --- | --- | --- |"]
    for name in table.cells:
        if name in values:
            found = estimate(list(values[name].values()))
            lines.append(f"| {name} | {_plus_minus(found)} | {found.n} |")
    differences = _differences(table, values)
    if differences:
        lines += ["", "| difference | mean | seeds | differs |", "| --- | --- | --- | --- |"]
        for cell, base, found in differences:
            verdict = "unknown" if found.margin is None else "no" if found.covers_zero() else "yes"
            lines.append(f"| {cell} − {base} | {_plus_minus(found)} | {found.n} | {verdict} |")
    return "\n".join(lines)


def _plus_minus(found: Estimate) -> str:
    return f"{found.mean:.3f}" + ("" if found.margin is None else f" ± {found.margin:.3f}")


def _plot(study: Study, table: Table, values: Values, path: Path) -> None:
    title = f"{table.title}: {table.metric}, mean and 95 % interval over seeds"

    def point(name: str, label: str) -> Interval:
        found = estimate(list(values[name].values()))
        return label, found.mean, found.margin

    measured = [name for name in table.cells if name in values]
    if table.x is None:
        write_interval_rows(path, title, [point(name, name) for name in measured])
        return
    series: dict[str, list[Interval]] = {}
    for name in measured:
        where = study.cells[name].coordinates
        line = str(where[table.series]) if table.series else table.metric
        series.setdefault(line, []).append(point(name, str(where[table.x])))
    write_interval_chart(path, title, table.x, series)

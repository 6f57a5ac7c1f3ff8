"""Fill the tables of a page with a study's results.

    python -m examples.pruned_coder.page runs/pruned_coder

It copies results.json and the plots to docs/results, and writes the rows of each table between the
two comments that enclose it on the page of results and in the README. What is not measured yet has
no row.
"""

import argparse
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from student_trainer.study.spec import Study, load_study

ROOT = Path(__file__).parents[2]
STUDY = Path(__file__).with_name("study.yaml")
PAGES = (
    ROOT / "docs/explanation/results-pruned-coder.md",
    Path(__file__).with_name("README.md"),
)
RESULTS = ROOT / "docs/results/pruned_coder.json"
PLOTS = ("pruned", "healing", "time", "teachers")
# <!-- cells TABLE ... --> or <!-- differences TABLE ... -->, the rows, and <!-- end -->.
_ENCLOSED = re.compile(r"<!-- (cells|differences) ([\w ]+) -->\n.*?<!-- end -->", re.S)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("folder", type=Path, help="--output_dir of the study")
    folder = parser.parse_args().folder
    shutil.copyfile(folder / "results.json", RESULTS)
    for name in PLOTS:
        if (folder / f"{name}.svg").exists():
            shutil.copyfile(folder / f"{name}.svg", _plot(name))
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        page.write_text(filled(text, load_study(STUDY), results, page.parent), encoding="utf-8")


def filled(text: str, study: Study, results: Mapping[str, Any], folder: Path) -> str:
    """Return a page's text with its tables made anew, and below each of cells its plot.

    Args:
        results: content of the study's results.json.
        folder: of the page, from which plots are linked.
    """

    def table(found: re.Match[str]) -> str:
        kind, names = found[1], found[2].split()
        rows = cell_rows if kind == "cells" else difference_rows
        lines = rows(study, results, names)
        if kind == "cells" and names[0] in PLOTS and _plot(names[0]).exists():
            title = next(table.title for table in study.tables if table.name == names[0])
            lines += ["", f"![{title}]({os.path.relpath(_plot(names[0]), folder)})"]
        return "\n".join([f"<!-- {kind} {found[2]} -->", *lines, "<!-- end -->"])

    return _ENCLOSED.sub(table, text)


def _plot(name: str) -> Path:
    return RESULTS.with_name(f"pruned-coder-{name.replace('_', '-')}.svg")


def cell_rows(study: Study, results: Mapping[str, Any], names: list[str]) -> list[str]:
    """Return the lines of a table of cells, with a column for the metric of each study's table."""
    tables = [table for name in names for table in study.tables if table.name == name]
    lines = _head("model", [table.metric for table in tables])
    for cell in tables[0].cells:
        found = [_of_metric(study, results, table.metric).get(cell) for table in tables]
        if None not in found:
            lines.append(_row(f"`{cell.removeprefix('humaneval_read.')}`", found))
    return lines


def difference_rows(study: Study, results: Mapping[str, Any], names: list[str]) -> list[str]:
    """Return the lines of a table of differences, with a column for each of the study's tables."""
    by_pair: list[dict[tuple[str, str], Any]] = [
        {(one["cell"], one["base"]): one for one in results["differences"][name]} for name in names
    ]
    metric = {table.name: table.metric for table in study.tables}
    lines = _head("difference", [metric[name] for name in names])
    for pair in by_pair[0]:
        cell, base = (part.removeprefix("humaneval_read.") for part in pair)
        lines.append(_row(f"`{cell}` − `{base}`", [pairs[pair] for pairs in by_pair]))
    return lines


def _head(first: str, metrics: list[str]) -> list[str]:
    names = [first, *metrics, "seeds"]
    return [f"| {' | '.join(names)} |", f"| {' | '.join('---' for _ in names)} |"]


def _row(name: str, found: list[Any]) -> str:
    seeds = "/".join(dict.fromkeys(str(one["n"]) for one in found))
    if all("all" in one.get("values", {}) for one in found):
        seeds = "one for all"
    return f"| {' | '.join([name, *map(_plus_minus, found), seeds])} |"


def _plus_minus(found: Mapping[str, Any]) -> str:
    digits = 3 if abs(found["mean"]) < 100 else 0
    mean = f"{found['mean']:,.{digits}f}"
    if found["interval"] is None:  # of a single seed
        return mean
    low, high = found["interval"]
    return f"{mean} ± {(high - low) / 2:,.{digits}f}"


def _of_metric(study: Study, results: Mapping[str, Any], metric: str) -> Mapping[str, Any]:
    if metric == study.metric:
        cells: Mapping[str, Any] = results["cells"]
        return cells
    of_metric: Mapping[str, Any] = results["other_metrics"].get(metric, {})
    return of_metric


if __name__ == "__main__":
    main()

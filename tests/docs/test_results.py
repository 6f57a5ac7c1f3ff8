"""The numbers on the pages of results are those of the studies in docs/results/."""

import json
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
ROW = re.compile(r"\| (\S+)(?: − (\S+))? \| (-?[\d.]+) ± ([\d.]+) \| (\d+) \|")


def found():
    """{(cell, base or None, mean, margin, seeds)} of both studies, rounded as the page does."""
    rows = set()
    for name in ("study", "samples"):
        results = json.loads((DOCS / "results" / f"{name}.json").read_text())
        for cell, numbers in results["cells"].items():
            rows.add((cell, None, *rounded(numbers)))
        for differences in results["differences"].values():
            for one in differences:
                rows.add((one["cell"], one["base"], *rounded(one)))
    return rows


def rounded(numbers):
    low, high = numbers["interval"]
    return f"{numbers['mean']:.3f}", f"{(high - low) / 2:.3f}", str(numbers["n"])


def test_every_row_is_a_figure_of_a_study():
    page = (DOCS / "explanation" / "results.md").read_text()
    rows = [
        (cell, base or None, mean, margin, seeds)
        for cell, base, mean, margin, seeds in ROW.findall(page)
    ]
    assert len(rows) > 40
    assert len(rows) == len(re.findall(r"^\| .*±", page, re.M))
    assert set(rows) - found() == set()


@pytest.mark.parametrize("name", ["study", "samples"])
def test_the_means_are_those_of_the_seeds(name):
    results = json.loads((DOCS / "results" / f"{name}.json").read_text())
    for numbers in results["cells"].values():
        values = list(numbers["values"].values())
        assert len(values) == numbers["n"]
        assert numbers["mean"] == pytest.approx(sum(values) / len(values), abs=1e-6)

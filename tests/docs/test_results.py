"""The numbers on the pages of results are those of the studies in docs/results/."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
ROW = re.compile(r"\| (\S+)(?: − (\S+))? \| (-?[\d.]+) ± ([\d.]+) \| (\d+) \|")
# Page -> the studies whose numbers it has, and the fewest rows that its tables have.
PAGES = {
    "docs/explanation/results.md": (("study", "samples"), 40),
    "docs/explanation/results-context.md": (("context",), 50),
}


def found(studies):
    """{(cell, base or None, mean, margin, seeds)} of these studies, rounded as the pages do."""
    rows = set()
    for name in studies:
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


@pytest.mark.parametrize("page", PAGES)
def test_every_row_is_a_figure_of_a_study(page):
    studies, fewest = PAGES[page]
    text = (ROOT / page).read_text()
    rows = [
        (cell, base or None, mean, margin, seeds)
        for cell, base, mean, margin, seeds in ROW.findall(text)
    ]
    assert len(rows) > fewest
    assert len(rows) == len(re.findall(r"^\| .*±", text, re.M))
    assert set(rows) - found(studies) == set()


@pytest.mark.parametrize("name", sorted({name for names, _ in PAGES.values() for name in names}))
def test_the_means_are_those_of_the_seeds(name):
    results = json.loads((DOCS / "results" / f"{name}.json").read_text())
    for numbers in results["cells"].values():
        values = list(numbers["values"].values())
        assert len(values) == numbers["n"]
        assert numbers["mean"] == pytest.approx(sum(values) / len(values), abs=1e-6)

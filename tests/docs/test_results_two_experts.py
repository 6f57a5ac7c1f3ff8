"""The numbers of the two experts, on their page and in the README, are those of the study."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = json.loads((ROOT / "docs/results/two_experts.json").read_text())
PAGES = ("docs/explanation/results-two-experts.md", "examples/two_experts/README.md")
KINDS = {"programs": RESULTS["cells"], "problems": RESULTS["other_metrics"]["exact_match"]}
NUMBER = r"(-?[\d.]+(?: ± [\d.]+)?)"
# | cell | programs | problems | seeds |
CELL = re.compile(rf"^\| `(\w+)` \| {NUMBER} \| {NUMBER} \| (\d+) \|$", re.M)
# | difference | programs | problems | seeds |
DIFFERENCE = re.compile(rf"^\| `(\w+)` − `(\w+)` \| {NUMBER} \| {NUMBER} \| (\d+) \|$", re.M)


def plus_minus(numbers):
    mean = f"{numbers['mean']:.3f}"
    if numbers["interval"] is None:  # of a single seed
        return mean
    low, high = numbers["interval"]
    return f"{mean} ± {(high - low) / 2:.3f}"


def differences(kind):
    return {(one["cell"], one["base"]): one for one in RESULTS["differences"][kind]}


@pytest.mark.parametrize("page", PAGES)
def test_every_row_of_a_table_is_the_studys(page):
    text = (ROOT / page).read_text()
    cells, pairs = CELL.findall(text), DIFFERENCE.findall(text)
    assert len(cells) >= 9
    assert len(cells) + len(pairs) == len(re.findall(r"^\| .*\d \|$", text, re.M))
    for name, programs, problems, seeds in cells:
        both = KINDS["programs"][name], KINDS["problems"][name]
        assert (programs, problems) == tuple(map(plus_minus, both))
        assert {one["n"] for one in both} == {int(seeds)}
    for cell, base, programs, problems, seeds in pairs:
        both = [differences(kind)[cell, base] for kind in KINDS]
        assert [programs, problems] == [*map(plus_minus, both)]
        assert {one["n"] for one in both} == {int(seeds)}


def test_the_page_has_every_cell_and_every_difference():
    text = (ROOT / PAGES[0]).read_text()
    assert {row[0] for row in CELL.findall(text)} == set(KINDS["programs"])
    assert {row[:2] for row in DIFFERENCE.findall(text)} == set(differences("programs"))


@pytest.mark.parametrize("kind", KINDS)
def test_the_means_are_those_of_the_seeds(kind):
    for numbers in KINDS[kind].values():
        values = list(numbers["values"].values())
        assert len(values) == numbers["n"]
        assert numbers["mean"] == pytest.approx(sum(values) / len(values), abs=1e-6)

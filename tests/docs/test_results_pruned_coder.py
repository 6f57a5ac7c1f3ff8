"""The numbers of the pruned coder, on their page and in the README, are those of the study."""

import json

import pytest

from examples.pruned_coder.page import PAGES, RESULTS, STUDY, filled
from student_trainer.study.spec import load_study


@pytest.fixture(scope="module")
def results():
    return json.loads(RESULTS.read_text())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_table_is_the_studys(page, results):
    text = page.read_text()
    assert filled(text, load_study(STUDY), results, page.parent) == text
    assert text.count("<!-- end -->") == text.count("<!-- cells") + text.count("<!-- differences")


def test_the_means_are_those_of_the_seeds(results):
    assert results["cells"]
    for cells in (results["cells"], *results["other_metrics"].values()):
        for numbers in cells.values():
            values = list(numbers["values"].values())
            assert len(values) == numbers["n"]
            assert numbers["mean"] == pytest.approx(sum(values) / len(values), abs=1e-6)

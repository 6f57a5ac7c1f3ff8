"""docs/reference/metrics.md explains every number of a logging window, under its logged name."""

import re
from pathlib import Path

from student_trainer.reporting.names import grouped_name
from student_trainer.training.metrics import WindowMetrics

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "reference" / "metrics.md").read_text()
MEASURED = re.findall(r"``(\w+(?:/\w+)*)``", WindowMetrics.__doc__)


def test_each_number_that_is_logged_is_explained():
    logged = {grouped_name(name) for name in MEASURED}
    explained = set(re.findall(r"`(\w+/[\w/]+)`", PAGE))
    assert len(logged) > 20
    assert sorted(logged - explained) == []


def test_pages_name_a_number_as_it_is_logged():
    without_group = {f"`{name}`" for name in MEASURED if "_" in name and "/" not in name}
    assert len(without_group) > 15
    found = [
        f"{page.relative_to(ROOT)}: {name}"
        for page in [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
        for name in sorted(without_group)
        if name in page.read_text()
    ]
    assert found == []

"""docs/reference/metrics.md explains every number of a logging window."""

import re
from pathlib import Path

from student_trainer.training.metrics import WindowMetrics

PAGE = (Path(__file__).parents[2] / "docs" / "reference" / "metrics.md").read_text()


def test_each_number_that_is_logged_is_explained():
    logged = set(re.findall(r"``(\w+)``", WindowMetrics.__doc__))
    explained = set(re.findall(r"`(\w+)`", PAGE))
    assert len(logged) > 20
    assert logged - explained == set()

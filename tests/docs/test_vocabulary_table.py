"""The table of the vocabulary's memory is what `benchmarks.vocabulary` measured."""

import json
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "explanation" / "performance.md").read_text()
FOUND = json.loads((ROOT / "docs" / "results" / "vocabulary.json").read_text())


def test_the_page_says_what_was_measured():
    peak, now = FOUND["autograd_mib"], FOUND["in_place_mib"]
    assert f"| peak of the resident set, MiB | {peak:,} | {now:,} |" in PAGE
    seconds = [f"{FOUND[name]:.1f}" for name in ("autograd_seconds", "in_place_seconds")]
    assert f"| processor time of a micro-batch, s | {' | '.join(seconds)} |" in PAGE
    assert not FOUND["quick"]

"""Pages name targets of make that exist, and `make help` names those that pages do."""

import re
import subprocess

from tests.support.repository import ROOT, pages

MAKEFILE = (ROOT / "Makefile").read_text()
_NAMED = re.compile(r"(?:`| {4,}|^)make ([a-z.][\w./-]*)", re.MULTILINE)


def test_each_target_that_a_page_names_exists():
    targets = set(re.findall(r"^([\w./-]+):(?!=)", MAKEFILE, re.MULTILINE))
    named = {(page, name) for page in pages() for name in _NAMED.findall((ROOT / page).read_text())}
    assert {"quickstart", "release-check", "rehearsal"} <= {name for _, name in named}
    assert {(page, name) for page, name in named if name not in targets} == set()


def test_the_steps_of_a_release_are_in_the_help():
    printed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    steps = re.findall(r"^ {7}make ([\w-]+)", (ROOT / "RELEASING.md").read_text(), re.MULTILINE)
    assert len(steps) >= 5
    assert [step for step in steps if f"make {step} " not in printed.stdout] == []

"""The tables of docs/architecture.md name what there is, and every folder."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
TABLES = [
    line.split("|")[1]
    for line in (ROOT / "docs" / "architecture.md").read_text().splitlines()
    if line.startswith("| `")
]
NAMED = {path for cell in TABLES for path in re.findall(r"`([\w/.]+)`", cell)}


def test_all_that_is_named_is_there():
    assert len(NAMED) > 15
    assert [path for path in sorted(NAMED) if not (ROOT / path).exists()] == []


def test_every_folder_is_named():
    packages = ("shared", "teacher_server", "student_trainer")
    folders = {
        f"{folder.parent.relative_to(ROOT)}/"
        for package in packages
        for folder in (ROOT / package).glob("*/__init__.py")
    }
    assert len(folders) > 5
    assert sorted(folders - NAMED) == []

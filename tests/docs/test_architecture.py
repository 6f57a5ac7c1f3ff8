"""The tables of the architecture page name what there is, every folder, and the order of layers."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "explanation" / "architecture.md").read_text()
TABLES = [line.split("|")[1] for line in PAGE.splitlines() if line.startswith("| `")]
STEPS = PAGE.split("## Where things are")[0]
IN_STEPS = set(re.findall(r"`([\w/]+/[\w/.]*)`", STEPS)) - {"v1/score"}
NAMED = {path for cell in TABLES for path in re.findall(r"`([\w/.]+)`", cell)}


def test_all_that_is_named_is_there():
    assert len(NAMED) > 15
    assert len(IN_STEPS) > 8
    assert [path for path in sorted(NAMED | IN_STEPS) if not (ROOT / path).exists()] == []


def test_every_folder_is_named():
    packages = ("shared", "teacher_server", "student_trainer")
    folders = {
        f"{folder.parent.relative_to(ROOT)}/"
        for package in packages
        for folder in (ROOT / package).glob("*/__init__.py")
    }
    assert len(folders) > 5
    assert sorted(folders - NAMED) == []


def test_the_trainers_packages_stand_in_the_order_that_import_linter_holds():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    (contract,) = (c for c in settings["contracts"] if c.get("containers") == ["student_trainer"])
    rank = {
        name.strip(): number
        for number, layer in enumerate(contract["layers"])
        for name in re.split("[|:]", layer)
    }
    named = [
        Path(path).stem
        for cell in TABLES
        for path in re.findall(r"`student_trainer/([\w/.]+)`", cell)
    ]
    assert sorted(named) == sorted(rank)
    assert [rank[name] for name in named] == sorted(rank[name] for name in named)

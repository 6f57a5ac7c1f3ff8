"""A promise in docs/reliability.md is one that a test keeps."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
PAGE = TESTS.parent / "docs" / "reliability.md"
ROWS = [line for line in PAGE.read_text().splitlines() if re.match(r"\| (?!-|fault)", line, re.I)]
# `file::test[case]`, or the test alone where its name says where it is.
NAMED = re.compile(r"`(?:(test_\w+\.py)::)?(test_\w+)(?:\[([^]]+)\])?`")


@cache
def defined():
    """{name: [(file, the strings in it)]} of all tests."""
    found = {}
    for path in TESTS.rglob("test_*.py"):
        tree = ast.parse(path.read_text())
        strings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
        for node in tree.body:
            if isinstance(node, ast.FunctionDef):
                found.setdefault(node.name, []).append((path.name, strings))
    return found


def test_every_row_of_the_page_names_a_test():
    assert len(ROWS) >= 40
    assert [row for row in ROWS if not NAMED.search(row)] == []


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.split("|")[1].strip())
def test_the_tests_named_for_a_fault_exist(row):
    for file, name, case in NAMED.findall(row):
        places = [place for place in defined().get(name, []) if file in ("", place[0])]
        assert places, f"{file}::{name}"
        assert not case or any(case in strings for _, strings in places), case

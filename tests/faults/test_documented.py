"""A promise in docs/explanation/reliability.md or SECURITY.md is one that a test keeps."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
PAGES = (TESTS.parent / "docs" / "explanation" / "reliability.md", TESTS.parent / "SECURITY.md")
# All but the heads of the tables.
ROW = re.compile(r"\| (?!-|fault |against |a program cannot )", re.I)
ROWS = [line for page in PAGES for line in page.read_text().splitlines() if ROW.match(line)]
# A test's name, whatever says where it is, and one of its cases.
NAMED = re.compile(r"(test_\w+)\b(?!\.py)(?:\[([^]`]+)\])?")


@cache
def defined():
    """{name: the strings in its file} of all tests."""
    found = {}
    for path in TESTS.rglob("test_*.py"):
        tree = ast.parse(path.read_text())
        strings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                found.setdefault(node.name, set()).update(strings)
    return found


def named_in(row):
    return NAMED.findall(row.rstrip(" |").rsplit("|", 1)[1])


def test_every_row_names_a_test():
    assert len(ROWS) >= 60
    assert [row for row in ROWS if not named_in(row)] == []


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.split("|")[1].strip())
def test_the_tests_named_for_a_fault_exist(row):
    for name, case in named_in(row):
        assert name in defined()
        assert not case or case in defined()[name]

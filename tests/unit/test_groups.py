"""The groups that workers take whole, and their order."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.conftest import LONG, group, pytest_collection_modifyitems

ROOT = Path(__file__).parents[2]


class Item:
    """A test as far as the order of tests looks at it."""

    def __init__(self, nodeid, *markers):
        self.nodeid = nodeid
        self.markers = dict(markers)

    def get_closest_marker(self, name):
        return self.markers.get(name)

    def add_marker(self, mark):
        self.markers[mark.name] = mark


def test_each_long_group_is_there():
    assert [name for name in LONG if name != "vllm" and not (ROOT / name).exists()] == []


def test_long_groups_come_first_and_tests_of_one_stay_in_order():
    named = Item("tests/faults/a.py::b", ("xdist_group", pytest.mark.xdist_group("n").mark))
    items = [
        Item("tests/docs/a.py::b"),
        Item("tests/api/a.py::second"),
        named,
        Item("tests/api/a.py::first"),
        Item("tests/api/a.py::c[vllm]", ("vllm", SimpleNamespace(name="vllm"))),
    ]
    pytest_collection_modifyitems(items)
    assert [item.nodeid for item in items] == [
        "tests/api/a.py::c[vllm]",
        "tests/api/a.py::second",
        "tests/api/a.py::first",
        "tests/docs/a.py::b",
        "tests/faults/a.py::b",
    ]
    assert [group(item) for item in items] == ["vllm", *2 * ["tests/api"], "tests/docs/a.py", "n"]
    assert named.get_closest_marker("xdist_group").args == ("n",)

"""The ranges of pyproject.toml, the oldest releases that are tested, and the pinned ones, agree."""

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
RANGES = {
    canonicalize_name(requirement.name): requirement.specifier
    for line in [*PROJECT["dependencies"], *EXTRAS["teacher"], *EXTRAS["trainer"]]
    for requirement in [Requirement(line)]
}


def pins(name):
    """Return the version of each package in a file of constraints."""
    lines = (line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines())
    pairs = (line.split("==") for line in lines if line)
    return {canonicalize_name(package): version for package, version in pairs}


def test_the_oldest_set_is_the_lower_end_of_each_range():
    lowest = {
        name: next(one.version for one in limits if one.operator == ">=")
        for name, limits in RANGES.items()
    }
    oldest = pins("constraints-oldest.txt")
    assert oldest.keys() == lowest.keys()
    for name, limits in RANGES.items():
        assert limits.contains(oldest[name]), name
        # A lower end of 1.1 is 1.1.0, the first of its releases.
        assert (oldest[name] + ".0").startswith(lowest[name] + "."), name
        assert set(oldest[name].removeprefix(lowest[name])) <= {".", "0"}, name


def test_what_is_pinned_is_in_its_range():
    pinned = pins("constraints.txt")
    assert [n for n, limits in RANGES.items() if not limits.contains(pinned[n])] == []


@pytest.mark.parametrize("extra", ["teacher", "trainer"])
def test_no_extra_but_vllms_pins_a_version(extra):
    pinned = [line for line in EXTRAS[extra] if "==" in line]
    assert pinned == []
    assert [line for line in EXTRAS["vllm"] if "==" in line] == ["vllm==0.32.0"]


def test_both_sides_allow_the_same_versions_of_what_they_share():
    sides = [
        {r.name: str(r.specifier) for r in map(Requirement, EXTRAS[extra])}
        for extra in ("teacher", "trainer")
    ]
    shared = sides[0].keys() & sides[1].keys()
    assert {"torch", "transformers"} <= shared
    assert [name for name in sorted(shared) if sides[0][name] != sides[1][name]] == []

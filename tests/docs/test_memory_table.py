"""The memory tables of docs/tutorials/own-gpu.md are what the trainer's estimate gives."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "tutorials" / "own-gpu.md").read_text()
LEFT_FOR_ACTIVATIONS = 5  # GB, as the page says


@pytest.fixture(scope="module")
def memory_table():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "docs" / "reference"))
        import memory_table

        yield memory_table


def rows(header):
    """The cells of a table of the page, by the first of each row."""
    table = PAGE.split(header)[1].split("\n\n")[0]
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in table.splitlines()]
    return {row[0]: row[1:] for row in cells if re.match(r"[\d.]+B$", row[0])}


NEEDED = rows("| model | weights to serve, bfloat16 |")


# The larger sizes are the same arithmetic, and take a minute.
@pytest.mark.parametrize("size", ["0.5B", "1.5B", "7B"])
def test_a_row_is_the_trainers_own_estimate(memory_table, size):
    estimates = [memory_table.estimate(size, way) for way in memory_table.WAYS]
    found = [memory_table.gigabytes(2 * estimates[-1].parameters)]
    assert NEEDED[size] == [*found, *(memory_table.gigabytes(m.total) for m in estimates)]


def test_a_card_is_named_where_a_way_first_fits_with_room_for_activations(memory_table):
    ways = list(memory_table.WAYS)
    fits = rows("| model | 24 GB |")
    assert list(fits) == list(NEEDED)
    for size, cells in fits.items():
        free = [card - LEFT_FOR_ACTIVATIONS for card in memory_table.CARDS]
        best = [
            max((w for w, need in enumerate(NEEDED[size][1:]) if float(need) <= room), default=None)
            for room in free
        ]
        said = [
            "" if way is None or (card and best[card - 1] == way) else ways[way]
            for card, way in enumerate(best)
        ]
        assert cells == said, size


def test_each_pair_fits_its_card():
    lines = re.findall(r"\| (\d+) GB \| .+ \| ([\d. +]+) \|$", PAGE, re.M)
    assert len(lines) == 4
    for card, terms in lines:
        assert sum(float(term) for term in terms.split("+")) <= int(card)

"""Charts of means: where the points and the ends of the bars are."""

import xml.etree.ElementTree as ET

import pytest

from student_trainer.reporting.svg import ticks, write_interval_chart, write_interval_rows

SVG = "{http://www.w3.org/2000/svg}"


def bars(root):
    """The drawn intervals: lines with a colour of a series."""
    return [line for line in root.iter(f"{SVG}line") if line.get("stroke") != "#d1d9e0"]


def test_a_chart_shows_each_mean_inside_its_interval(tmp_path):
    series = {"bucket": [("1", 0.4, 0.1), ("16", 0.6, None)], "drop": [("16", 0.5, 0.05)]}
    write_interval_chart(tmp_path / "chart.svg", "a < b", "k", series)
    root = ET.parse(tmp_path / "chart.svg").getroot()
    circles, lines = list(root.iter(f"{SVG}circle")), bars(root)
    heights = [float(line.get("y1")) - float(line.get("y2")) for line in lines]
    assert heights[0] == pytest.approx(2 * heights[2], abs=0.2)
    assert heights[1] == 0  # one seed has no interval
    for circle, line in zip(circles, lines, strict=True):
        middle = (float(line.get("y1")) + float(line.get("y2"))) / 2
        assert float(circle.get("cy")) == pytest.approx(middle, abs=0.1)
    texts = [text.text for text in root.iter(f"{SVG}text")]
    assert {"a < b", "1", "16", "k", "bucket", "drop"} < set(texts)
    # Two series at one k stand side by side.
    assert float(circles[2].get("cx")) - float(circles[1].get("cx")) == pytest.approx(7)


def test_rows_lie_on_one_scale(tmp_path):
    write_interval_rows(tmp_path / "rows.svg", "t", [("a", 0.2, 0.1), ("b", 0.4, 0.1)])
    root = ET.parse(tmp_path / "rows.svg").getroot()
    first, second = (float(circle.get("cx")) for circle in root.iter(f"{SVG}circle"))
    low, high = (float(bars(root)[0].get(end)) for end in ("x1", "x2"))
    assert second - first == pytest.approx(high - low, abs=0.2)


@pytest.mark.parametrize(
    ("low", "high", "marks"), [(0.0, 1.0, [0, 0.5, 1.0]), (0.52, 0.61, [0.55, 0.6])]
)
def test_ticks_are_round_numbers(low, high, marks):
    assert ticks(low, high) == marks

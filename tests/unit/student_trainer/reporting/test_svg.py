"""Charts of means: where the points and the ends of the bars are."""

import xml.etree.ElementTree as ET

import pytest

from student_trainer.reporting.axes import format_number, ticks
from student_trainer.reporting.svg import (
    dashes,
    draw_lines,
    thinned,
    write_interval_chart,
    write_interval_rows,
)

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


def texts_of(line, **options):
    drawn = draw_lines({"a": line}, "step", "nats", **options)
    root = ET.fromstring(f"<svg>{drawn}</svg>")
    *marks, x_label, y_label = [text.text for text in root.iter("text")]
    assert x_label == "step"
    return marks, y_label


@pytest.mark.parametrize(
    ("values", "marks", "unit"),
    [
        ((0.9989, 0.9991), ["94 %", "96 %", "98 %", "100 %"], "nats, not from 0"),
        ((0.61, 0.93), ["60 %", "70 %", "80 %", "90 %", "100 %"], "nats, not from 0"),
        ((0.0, 0.004), ["0 %", "2 %", "4 %", "6 %"], "nats"),
        ((0.02, 0.97), ["0 %", "50 %", "100 %"], "nats"),
        ((0.69, 0.834), ["65 %", "70 %", "75 %", "80 %", "85 %"], "nats, not from 0"),
    ],
    ids=["near one", "above half", "near zero", "all", "between"],
)
def test_a_scale_of_shares_fits_them_but_does_not_blow_up_their_noise(values, marks, unit):
    found, label = texts_of(list(enumerate(values)), share=True)
    assert (found[: len(marks)], label) == (marks, unit)


@pytest.mark.parametrize(
    ("values", "marks", "unit"),
    [
        ((5.3e-6, 2e-6), ["0", "2", "4", "6"], "10⁻⁶ nats"),
        ((0.126, 0.009), ["0", "0.05", "0.1", "0.15"], "nats"),
        ((1400.0, 800.0), ["0", "500", "1,000", "1,500"], "nats"),
        ((0.5, 0.0018), ["0.001", "0.01", "0.1"], "nats, logarithmic"),
        (
            (0.5, 0.0098),
            ["0.005", "0.01", "0.02", "0.05", "0.1", "0.2", "0.5"],
            "nats, logarithmic",
        ),
        ((2e-4, 1e-6), ["10⁻⁶", "10⁻⁵", "10⁻⁴"], "nats, logarithmic"),
        ((3.1, 3.0), ["3", "3.05", "3.1"], "nats, not from 0"),
        ((0.0, 0.0), ["0", "0.5", "1"], "nats"),
        ((3.0, 3.0), ["0", "1", "2", "3"], "nats"),
    ],
    ids=[
        "tiny",
        "small",
        "large",
        "decades",
        "two decades",
        "tiny decades",
        "narrow",
        "zero",
        "constant",
    ],
)
def test_the_scale_fits_and_its_marks_are_plain_numbers(values, marks, unit):
    found, label = texts_of(list(enumerate(values)))
    assert (found[: len(marks)], label) == (marks, unit)
    assert not any("e" in mark for mark in found)


@pytest.mark.parametrize(
    ("last", "steps"),
    [(1, ["0", "1"]), (3, ["0", "1", "2", "3"]), (30_000, ["0", "10,000", "20,000", "30,000"])],
)  # fmt: skip
def test_steps_are_whole_numbers(last, steps):
    marks, _ = texts_of([(1, 1.0), (last, 1.0)])
    assert marks[-len(steps) :] == steps
    assert marks[-len(steps) - 1] == "1"  # of y


@pytest.mark.parametrize(
    ("value", "share", "text"),
    [
        (5.3e-6, False, "5.3 × 10⁻⁶"), (0.00919, False, "0.00919"), (12345.6, False, "12,346"),
        (2.0, False, "2"), (0.0, False, "0"), (-0.25, False, "-0.25"), (3e9, False, "3 × 10⁹"),
        (0.998, True, "99.8 %"), (1.0, True, "100 %"), (0.0, True, "0 %"),
        (0.00012, True, "0.012 %"),
    ],
)  # fmt: skip
def test_numbers_are_written_as_people_write_them(value, share, text):
    assert format_number(value, share=share).replace("\u00a0", " ") == text


def test_thirty_lines_differ_in_colour_or_dashes():
    assert len({(number % 6, dashes(number)) for number in range(30)}) == 30


def test_a_long_run_keeps_its_spikes_in_few_points():
    line = [(float(x), 1.0) for x in range(50_000)]
    line[31_234] = (31_234.0, 9.0)
    few = thinned(line)
    assert len(few) <= 601
    assert line[31_234] in few
    assert (few[0], few[-1]) == (line[0], line[-1])
    assert [x for x, _ in few] == sorted(x for x, _ in few)


@pytest.mark.parametrize(
    ("low", "high", "marks"), [(0.0, 1.0, [0, 0.5, 1.0]), (0.52, 0.61, [0.55, 0.6])]
)
def test_ticks_are_round_numbers(low, high, marks):
    assert ticks(low, high) == marks


def test_values_as_small_as_rounding_have_a_scale():
    assert "<polyline" in draw_lines({"run": [(1, 3e-16), (2, 2e-17)]}, "step", "nats")
    assert "<polyline" in draw_lines({"run": [(1, -3e-16), (2, 0.0)]}, "step", "nats")

"""The page stands alone, shows what it is given, and lets nothing through as markup."""

import math
import re
from html.parser import HTMLParser

import pytest

from student_trainer.reporting.content import (
    Chart,
    Delta,
    Report,
    Samples,
    SideBySide,
    Table,
    Token,
)
from student_trainer.reporting.page import render
from student_trainer.reporting.svg import COLOURS, LINES_FRAME, TEACHER


@pytest.fixture
def page():
    return render(
        Report(
            title="A <run>",
            lead=["Two & more", "Look first at the loss."],
            tables={
                "": Table(("Model", "pass@1"), [("first", "0.25"), ("second", "0.50")], best=1)
            },
            charts=[
                Chart(
                    "Loss",
                    "nats",
                    {"a": [(0, 2.0), (10, 1.0), (20, math.nan)], "b": [(5, 1)]},
                    words="What is minimised.",
                    note="See --beta.",
                    better="lower",
                ),
                Chart("Nothing", "none", {"a": []}),
                Chart("Flat", "x", {"a": [(1, 3.0), (2, 3.0)]}),
            ],
            seconds={"whole": {"one": 30.0, "two": 10.0}, "half": {"three": 20.0}},
            samples=[
                Samples(
                    "Side by side",
                    "1 of <9>",
                    [SideBySide("do <this>", "return 1", {"m": ("return 2", False)})],
                )
            ],
            commands=["cmd --x '<y>'"],
        )
    )


class Text(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.words = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words.append(data)


def parsed(page):
    text = Text()
    text.feed(page)
    return text


def test_no_script_and_no_address_is_on_the_page(page):
    tags = parsed(page).tags
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in tags}
    assert not any({"src", "href"} & attrs.keys() for _, attrs in tags)
    assert "url(" not in page
    assert "@import" not in page


def test_text_is_escaped(page):
    words = "".join(parsed(page).words)
    assert "A <run>" in words
    assert "do <this>" in words
    assert "cmd --x '<y>'" in words
    assert "<this>" not in page


def test_the_best_row_is_set_off(page):
    (row,) = re.findall(r'<tr class="best">(.*?)</tr>', page)
    assert "second" in row


def test_lines_run_through_their_finite_points_inside_the_frame(page):
    lines = [attrs["points"] for tag, attrs in parsed(page).tags if tag == "polyline"]
    points = [[tuple(map(float, p.split(","))) for p in line.split()] for line in lines]
    assert [len(line) for line in points] == [2, 1]  # the NaN and the empty chart are left out
    (x0, y0), (x1, y1) = points[0]
    assert x0 < x1
    assert y0 < y1  # the loss falls: down is larger in SVG
    left, right, top, bottom = LINES_FRAME
    assert all(left <= x <= right and top <= y <= bottom for line in points for x, y in line)


def test_bars_share_one_scale(page):
    widths = [float(w) for w in re.findall(r"style=\"width:([\d.]+)%", page)]
    assert widths == [100.0, 33.33, 66.67]
    words = " ".join(parsed(page).words)
    assert "one 30.0 s  75\u00a0%" in words
    assert "three 20.0 s  100\u00a0%" in words


def test_completions_say_whether_they_pass(page):
    assert '<div class="fails"><h3>m <em>✗ fails</em></h3><pre>return 2</pre></div>' in page


def test_what_is_good_stands_at_the_chart_and_flags_are_not_broken(page):
    figure = page[page.index("<figure>") : page.index("</figure>")]
    assert "<figcaption>Loss <em class=badge>↓ lower is better</em></figcaption>" in figure
    assert "What is minimised." in figure
    assert "See <code>--beta</code>." in figure


@pytest.mark.parametrize(
    ("series", "share", "said"),
    [
        ({"a": [(1, 3.0), (2, 3.0)]}, False, "constant: 3"),
        ({"a": [(1, 0.0), (2, 0.0)], "b": [(1, 0.0), (2, 0.0)]}, True, "constant: 0\u00a0%"),
        ({"a": [(1, 0.5), (2, 0.5)], "b": [(1, 1.0)]}, False, "constant: a 0.5, b 1"),
        ({"a": [(40, 0.25)]}, False, "logged once, at step 40: 0.25"),
    ],
    ids=["one", "alike", "unlike", "once"],
)
def test_a_chart_that_never_changes_is_a_line_of_text(series, share, said):
    chart = Chart("Flat", "x", series, words="It is flat.", better="lower", share=share)
    page = render(Report(title="t", lead=[], tables={}, charts=[chart]))
    assert "<figure>" not in page
    assert f"<li><b>Flat</b> {said}. <span class=note>It is flat. Lower is better.</span>" in page


def test_a_chart_in_which_one_line_changes_is_drawn():
    assert Chart("c", "x", {"a": [(1, 3.0), (2, 3.0)], "b": [(1, 1.0), (2, 2.0)]}).constant() == ""


@pytest.mark.parametrize(
    ("low", "high", "verdict", "left", "width"),
    [(-1.0, 0.5, "chance", 0.0, 75.0), (0.5, 1.0, "better", 75.0, 25.0)],
    ids=["chance", "better"],
)
def test_an_interval_of_a_difference_is_drawn_against_zero(low, high, verdict, left, width):
    table = Table(("Metric", "interval"), [("m", Delta("x", low, high, verdict))])
    page = render(Report(title="t", lead=[], tables={"": table}))
    assert f'range zero {verdict}\'><i style="left:{left}%;width:{width}%">' in page


def test_a_chart_says_in_words_what_it_shows(page):
    """For a reader of screens: its name, and where each line begins and ends."""
    (svg,) = re.findall(r"<svg viewBox='0 0 340 224' role=img[^>]*>.*?<text", page)[:1]
    title, description = re.search(r"aria-labelledby='(\S+) (\S+)'", svg).groups()
    assert f"<title id={title}>Loss</title>" in svg
    assert f"<desc id={description}>a: 2 at step 0, 1 at step 10, lowest 1, highest 2. b:" in svg
    ids = re.findall(r" id=(\w+)", page)
    assert len(ids) == len(set(ids))


@pytest.fixture
def coloured():
    """Two runs and their teacher, in every place that has a colour."""
    series = {name: [(0, 1.0), (1, 0.5)] for name in ("teacher", "first", "second")}
    numbers = {"teacher": TEACHER, "first": 0, "second": 1}
    token = [Token("a", 0.5, [("a", 0.5, 0.25)])]
    return render(
        Report(
            title="t",
            lead=[],
            tables={"": Table(("Run", "x"), [("first", "1"), ("second", "2")], numbers=(0, 1))},
            charts=[Chart("Mass", "", series, numbers=numbers)],
            seconds={"second": {"waiting": 1.0}},
            numbers={"second": 1},
            samples=[
                Samples(
                    "s",
                    "",
                    [SideBySide("p", "", {"second": ("c", True)}, {"first": token}, numbers)],
                )
            ],
        )
    )


def test_one_colour_is_one_run_on_the_whole_page(coloured):
    """Charts, keys, time and tokens: teacher grey, each run its own, in dashes of its own."""
    assert set(re.findall(r'polyline class="line (c\w)"', coloured)) == {"ct", "c0", "c1"}
    assert re.findall(r'<b class="(c\w)" style="width', coloured) == ["c1"]
    assert re.findall(r'<tr class="(n\d)">', coloured) == ["n0", "n1"]
    assert '<pre class="tokens n0">' in coloured
    keys = re.findall(r'class="line (c\w)" d="M0 4H24"(?: stroke-dasharray="([^"]*)")?', coloured)
    assert dict(keys).keys() == {"ct", "c0", "c1"}
    assert len(set(keys)) == 3  # each colour with one pattern, each pattern another
    assert len({dash for _, dash in set(keys)}) == 3
    heading = coloured[coloured.index("<h3>", coloured.index("id=samples-0")) :]
    assert re.search(r'class="line c1"[^>]*/></svg>second <em>', heading)


def luminance(colour):
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_text_and_lines_stand_out_as_wcag_asks(page, scheme):
    """4.5 for text and 3 for graphics (WCAG 2.2, 1.4.3 and 1.4.11)."""
    block = re.findall(r":root\{(.*?)\}", page, re.DOTALL)[scheme]
    found = dict(re.findall(r"--(\w+):(#[0-9a-f]{3,6})", block))
    colours = {
        name: "#" + "".join(2 * c for c in value[1:]) if len(value) == 4 else value
        for name, value in found.items()
    }
    for ground in ("paper", "panel"):
        for name in ("ink", "soft", "good", "bad"):
            assert contrast(colours[name], colours[ground]) >= 4.5, (name, ground)
        for name in ("ct", *(f"c{i}" for i in range(len(COLOURS)))):
            assert contrast(colours[name], colours[ground]) >= 3, (name, ground)
    heat = [int(part) for part in re.search(r"--heat:([\d ]+)", block)[1].split()]
    panel = [int(colours["panel"][i : i + 2], 16) for i in (1, 3, 5)]
    shaded = [round(0.75 * h + 0.25 * p) for h, p in zip(heat, panel, strict=True)]
    assert contrast(colours["ink"], "#{:02x}{:02x}{:02x}".format(*shaded)) >= 4.5
    lines = [colours[f"c{i}"] for i in range(len(COLOURS))]
    assert len({*lines, colours["ct"], colours["good"], colours["bad"]}) == 9

"""The page stands alone, shows what it is given, and lets nothing through as markup."""

import math
import re
from html.parser import HTMLParser

import pytest

from student_trainer.reporting.page import Chart, Report, SideBySide, Table, render


@pytest.fixture
def page():
    return render(
        Report(
            title="A <run>",
            lead="Two & more",
            tables={
                "": Table(("Model", "pass@1"), [("first", "0.25"), ("second", "0.50")], best=1)
            },
            charts=[
                Chart("Loss", "nats", {"a": [(0, 2.0), (10, 1.0), (20, math.nan)], "b": [(5, 1)]}),
                Chart("Nothing", "none", {"a": []}),
                Chart("Flat", "x", {"a": [(1, 3.0), (2, 3.0)]}),
            ],
            seconds={"whole": {"one": 30.0, "two": 10.0}, "half": {"three": 20.0}},
            samples=[SideBySide("do <this>", "return 1", {"m": ("return 2", False)})],
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
    (row,) = re.findall(r"<tr class=best>(.*?)</tr>", page)
    assert "second" in row


def test_lines_run_through_their_finite_points_inside_the_frame(page):
    lines = [attrs["points"] for tag, attrs in parsed(page).tags if tag == "polyline"]
    points = [[tuple(map(float, p.split(","))) for p in line.split()] for line in lines]
    assert [len(line) for line in points] == [2, 1, 2]  # the NaN and the empty chart are left out
    (x0, y0), (x1, y1) = points[0]
    assert x0 < x1
    assert y0 < y1  # the loss falls: down is larger in SVG
    assert all(62 <= x <= 408 and 12 <= y <= 200 for line in points for x, y in line)


def test_bars_share_one_scale(page):
    widths = [float(w) for w in re.findall(r"style=\"width:([\d.]+)%", page)]
    assert widths == [75.0, 25.0, 50.0]
    words = "".join(parsed(page).words)
    assert "one 30.0 s" in words
    assert "three 20.0 s" in words


def test_completions_say_whether_they_pass(page):
    assert '<div class="fails"><h3>m <em>fails</em></h3><pre>return 2</pre></div>' in page

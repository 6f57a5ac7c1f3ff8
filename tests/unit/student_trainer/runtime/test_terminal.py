"""Colours and bars where there is a terminal; plain lines where there is none."""

import io

import pytest

from shared.printable import printable
from student_trainer.runtime import progress
from student_trainer.runtime.terminal import has_colours, painted


class Stream(io.StringIO):
    def __init__(self, terminal):
        super().__init__()
        self.terminal = terminal

    def isatty(self):
        return self.terminal


@pytest.mark.parametrize(
    ("terminal", "environment", "colours"),
    [
        (True, {}, True),
        (False, {}, False),
        (True, {"NO_COLOR": "1"}, False),
        (True, {"NO_COLOR": ""}, True),
        (True, {"TERM": "dumb"}, False),
    ],
)
def test_colours_are_for_terminals_that_want_them(monkeypatch, terminal, environment, colours):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert has_colours(Stream(terminal)) is colours


def test_colours_end_with_each_line():
    assert painted("a\n\nb", "green", True) == "\033[32ma\033[0m\n\n\033[32mb\033[0m"
    assert painted("a\nb", "green", False) == "a\nb"


def test_control_characters_are_spelled_out():
    assert printable("é\n\t\x1b[2J\u202e") == "é\n\t\\x1b[2J\\u202e"


def count_to_100(monkeypatch, seconds, *, terminal=False, **options):
    """Return the text on standard error, when each of a hundred takes so many seconds."""
    error, now = Stream(terminal), [0.0]
    monkeypatch.setattr("sys.stderr", error)
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    for _ in progress.tracked(range(100), 100, "Counting", **options):
        now[0] += seconds
    return error.getvalue()


def test_a_log_gets_a_line_now_and_then(monkeypatch):
    assert count_to_100(monkeypatch, 0.61).splitlines() == [
        "Counting: 17 of 100, about 51 s left",
        "Counting: 67 of 100, about 20 s left",
        "Counting: 100 of 100, in 61 s",
    ]


def test_a_log_gets_nothing_of_what_is_short_or_not_to_be_shown(monkeypatch):
    assert count_to_100(monkeypatch, 0.05) == ""
    assert count_to_100(monkeypatch, 5, show=False) == ""


def test_a_terminal_gets_a_bar(monkeypatch):
    assert "Counting:   0%|" in count_to_100(monkeypatch, 5, terminal=True)

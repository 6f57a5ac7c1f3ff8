"""A record becomes one line, in text or as an object, with what was bound around it."""

import json
import logging
import os
import re
import subprocess
import sys
import threading

import pytest

from shared import logs


def line(formatter, message="a %s", *arguments, **options):
    """Return a record as the formatter writes it."""
    record = logging.getLogger("here").makeRecord(
        "here", logging.INFO, "file", 1, message, arguments, options.pop("exc_info", None),
        extra=options,
    )  # fmt: skip
    return formatter.format(record)


def entry(message="a %s", *arguments, **options):
    return json.loads(line(logs.JsonFormatter(), message, *arguments, **options))


def test_a_line_in_json_has_time_level_logger_message_and_fields():
    found = entry("a %s", "b", status=200, metrics={"loss": 0.5})
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", found.pop("time"))
    assert found == {
        "level": "info", "logger": "here", "message": "a b", "status": 200,
        "metrics": {"loss": 0.5},
    }  # fmt: skip


def test_whatever_is_said_is_one_line_of_strict_json():
    def refuse(constant):
        raise AssertionError(constant)

    said = line(
        logs.JsonFormatter(), "two\nlines, \x1b[31mcolour, ü and \ud800", nan=float("nan"),
        inside={"inf": float("inf")}, thing=object(),
    )  # fmt: skip
    assert said.isascii()
    assert "\n" not in said
    found = json.loads(said, parse_constant=refuse)
    assert (found["nan"], found["inside"]) == ("nan", {"inf": "inf"})


def test_a_traceback_is_a_field():
    try:
        raise ValueError("why")
    except ValueError:
        found = entry("failed", exc_info=sys.exc_info())
    assert found["exception"].startswith("Traceback")
    assert found["exception"].endswith("ValueError: why")


def test_no_field_takes_the_place_of_what_every_line_has():
    with logs.bound(level="mine", time="mine"):
        found = entry("a", logger="mine")
    assert (found["level"], found["logger"]) == ("info", "here")
    assert found["time"] != "mine"


def test_what_is_bound_is_in_both_formats_until_its_block_ends():
    text = logs.TextFormatter("%(levelname)s %(message)s")
    with logs.bound(request_id="r"):
        logs.bind(attempt=2)
        assert line(text, "a") == "INFO a [request_id=r attempt=2]"
        found = entry("a")
        assert (found["request_id"], found["attempt"]) == ("r", 2)
        assert logs.bound_field("request_id") == "r"
    assert line(text, "a") == "INFO a"
    assert entry("a").keys() == {"time", "level", "logger", "message"}
    assert logs.bound_field("request_id") is None


def test_another_thread_has_fields_of_its_own():
    seen = []
    with logs.bound(request_id="r"):
        thread = threading.Thread(target=lambda: seen.append(logs.bound_field("request_id")))
        thread.start()
        thread.join()
    assert seen == [None]


SCRIPT = """
import logging, threading, warnings
from shared import logs

library = logging.getLogger("library")
library.addHandler(logging.StreamHandler())
library.propagate = False
logs.setup("{form}", level="info", text="%(levelname)s %(message)s")
logs.adopt("library")
library.warning("from a library")
warnings.warn("a warning")
thread = threading.Thread(target=lambda: 1 / 0)
thread.start()
thread.join()
logs.log_failure("program", "the reason")
raise KeyError("unforeseen")
"""


def stderr(form):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(form=form)], capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 1
    return done.stderr


def test_in_json_nothing_on_stderr_is_anything_else():
    lines = [json.loads(text) for text in stderr("json").splitlines()]
    assert [(it["level"], it["logger"]) for it in lines] == [
        ("warning", "library"), ("warning", "py.warnings"), ("error", "root"),
        ("critical", "program"), ("critical", "root"),
    ]  # fmt: skip
    assert lines[0]["message"] == "from a library"
    assert "ZeroDivisionError" in lines[2]["exception"]
    assert lines[3]["message"] == "the reason"
    assert "KeyError: 'unforeseen'" in lines[4]["exception"]


def test_in_text_a_library_keeps_its_own_lines_and_a_command_its_last_words():
    said = stderr("text").splitlines()
    assert said[0] == "from a library"
    assert "program: error: the reason" in said


@pytest.mark.parametrize(
    ("terminal", "form", "off"),
    [(False, "text", True), (True, "text", False), (True, "json", True)],
)
def test_bars_of_libraries_are_for_terminals(terminal, form, off):
    script = (
        "import os, sys\n"
        "from shared import logs\n"
        f"sys.stderr.isatty = lambda: {terminal}\n"
        f"logs.setup('{form}', level='info', text='')\n"
        "print([os.environ.get(f'HF_{it}_DISABLE_PROGRESS_BARS') for it in ('HUB', 'DATASETS')])\n"
    )
    environment = {k: v for k, v in os.environ.items() if not k.endswith("_PROGRESS_BARS")}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True
    )
    assert done.stdout.strip() == str(["1" if off else None] * 2)

"""One word for one thing, where users read it: a request is sent, not a question asked."""

import ast
import re
from pathlib import Path

import pytest

from student_trainer.config.flags import flags_of
from student_trainer.config.parse import ARGUMENTS

ROOT = Path(__file__).parents[2]
AVOIDED = re.compile(r"\b(asked|asking|question)\b")


def texts(file):
    """The strings of a module: messages and docstrings."""
    tree = ast.parse(file.read_text())
    return [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]


@pytest.mark.parametrize(
    "file", sorted((ROOT / "student_trainer" / "teacher").glob("*.py")), ids=lambda file: file.stem
)
def test_the_clients_of_a_teacher_speak_of_requests(file):
    assert [text for text in texts(file) if AVOIDED.search(text)] == []


def test_the_help_of_flags_about_a_teacher_speaks_of_requests():
    of_teacher = [
        one
        for kind in ARGUMENTS["distill"]
        for name, one in flags_of(kind).items()
        if name.startswith("teacher") and name != "teacher_prompt_template"  # a column's name
    ]
    assert of_teacher
    assert [one.name for one in of_teacher if AVOIDED.search(one.help)] == []

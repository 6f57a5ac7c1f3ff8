"""The first line of each docstring tells what a thing does: a verb, or a noun with its article."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = (
    "shared",
    "teacher_server",
    "student_trainer",
    "benchmarks",
    "examples",
    "docs/reference",
    "tests/support",
)
# A first line that begins with one of these is a question or a fragment.
FRAGMENTS = {
    "And", "As", "How", "Of", "Raises", "Same", "That", "What", "When", "Where", "Whether",
    "Which", "Who", "Why",
}  # fmt: skip
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def first_lines(source: str):
    """Yield (line number, first line) of each docstring in a module's source."""
    for node in ast.walk(ast.parse(source)):
        text = ast.get_docstring(node) if isinstance(node, DOCUMENTED) else None
        if text:
            yield node.body[0].lineno, text.splitlines()[0]


def is_fragment(line: str) -> bool:
    """Return whether a first line does not say what the thing does."""
    words = line.split()
    return words[0].strip(",:;") in FRAGMENTS or not line[0].isupper() or len(words) < 2


@pytest.mark.parametrize("folder", FOLDERS)
def test_first_lines_can_be_read_alone(folder):
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    found = [
        f"{file.relative_to(ROOT)}:{number}: {line}"
        for file in files
        for number, line in first_lines(file.read_text())
        if is_fragment(line)
    ]
    assert found == []


@pytest.mark.parametrize("folder", FOLDERS)
def test_modules_and_public_classes_have_a_docstring(folder):
    found = []
    for file in sorted((ROOT / folder).rglob("*.py")):
        module = ast.parse(file.read_text())
        classes = [node for node in module.body if isinstance(node, ast.ClassDef)]
        for node in [module, *(node for node in classes if not node.name.startswith("_"))]:
            if not ast.get_docstring(node):
                found.append(f"{file.relative_to(ROOT)}: {getattr(node, 'name', 'the module')}")
    assert found == []


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("Return the mean.", False),
        ("A batch that waits.", False),
        ("What is measured.", True),
        ("`score`, but later.", True),
        ("[N] int64: indices.", True),
        ("Of the draws.", True),
        ("Whether, and how.", True),
    ],
)
def test_fragments_are_told_from_sentences(line, expected):
    assert is_fragment(line) is expected

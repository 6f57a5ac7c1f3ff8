"""Code is found in whatever form a model gives it, and wrong code stays wrong."""

import ast
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from student_trainer.data.rows import load_rows
from student_trainer.evaluation.checkers import check_completions
from student_trainer.evaluation.extract import extract_code
from student_trainer.evaluation.suites import problems_of
from tests.support.data import published
from tests.unit.student_trainer.evaluation.wrappings import Task, wrappings

# An import that only the prompt has, and a helper that it defines.
PROMPT = '''from typing import List


def double(value: int) -> int:
    return 2 * value


def total(values: List[int]) -> int:
    """Return twice the sum of the values that aren't negative.
    >>> total([1, 2, -3])
    6
    """
'''
BODY = """    result = 0
    for value in values:
        if value < 0:
            continue
        result += double(value)

    return result
"""
TEST = """def check(candidate):
    assert candidate([1, 2, -3]) == 6
    assert candidate([]) == 0
"""
OWN = Task(PROMPT, "total", BODY)
CHECKER = {"kind": "python", "prompt": PROMPT, "entry_point": "total", "test": TEST}
NAMES = sorted(wrappings(OWN))


def wrong(task):
    body = re.sub(r"\breturn .*", "return 'wrong'", task.body)
    return Task(task.prompt, task.name, body)


def verdicts(checker, texts):
    """Return the verdict on each text; those that give the same program have it run once."""
    fields = {"prompt": checker["prompt"], "entry_point": checker["entry_point"]}
    codes = {name: extract_code(text, **fields) for name, text in texts.items()}
    one_of = {code: texts[name] for name, code in codes.items()}
    found = check_completions([checker] * len(one_of), list(one_of.values()))
    of_code = dict(zip(one_of, found, strict=True))
    return {name: of_code[code] for name, code in codes.items()}


def test_there_are_as_many_wrappings_as_promised():
    assert len(NAMES) >= 100


def test_right_code_passes_in_every_wrapping():
    found = verdicts(CHECKER, wrappings(OWN))
    assert {name: r.detail for name, r in found.items() if not r.passed} == {}


def test_wrong_code_fails_in_every_wrapping():
    found = verdicts(CHECKER, wrappings(wrong(OWN)))
    assert [name for name, r in found.items() if r.passed] == []


@pytest.mark.parametrize("number", [0, 10, 32, 38, 50, 53])
def test_published_problems_pass_in_every_wrapping(number):
    rows = load_rows(published("HumanEval.jsonl.gz"), config=None, split="train")
    problem = problems_of(rows, "auto")[number]
    fields = problem.checker
    task = Task(fields["prompt"], fields["entry_point"], problem.reference)
    found = verdicts(fields, wrappings(task))
    assert {name: r.detail for name, r in found.items() if not r.passed} == {}
    found = verdicts(fields, wrappings(wrong(task)))
    assert [name for name, r in found.items() if r.passed] == []


MAIN = (
    "body", "body, first indentation lost", "body and the same def", "body, closing fence, prose",
    "whole between prose", "fence", "fence Python", "fence in a list", "fence not closed",
    "usage fence first", "think", "calls in the fence",
)  # fmt: skip


@pytest.mark.parametrize("name", MAIN)
def test_every_published_solution_is_found_as_it_is(name):
    rows = load_rows(published("HumanEval.jsonl.gz"), config=None, split="train")
    for problem in problems_of(rows, "auto"):
        fields = problem.checker
        task = Task(fields["prompt"], fields["entry_point"], problem.reference)
        code = extract_code(
            wrappings(task)[name], prompt=fields["prompt"], entry_point=fields["entry_point"]
        )
        assert _function(code, task.name) == _function(task.whole, task.name), problem.task_id


def _function(code, name):
    (node,) = [
        n for n in ast.parse(code).body if isinstance(n, ast.FunctionDef) and n.name == name
    ][-1:]
    return ast.dump(node)


def passes(text, body_of="f", prompt="def f(x):\n", test="assert c(2) == 4", truncated=False):
    checker = {
        "kind": "python", "prompt": prompt, "entry_point": body_of,
        "test": f"def check(c):\n    {test}\n",
    }  # fmt: skip
    return check_completions([checker], [text], truncated=[truncated])[0].passed


@pytest.mark.parametrize(
    "text",
    [
        "f = lambda x: 2 * x",
        "The answer is `f = lambda x: 2 * x`, isn't it?",
        "`def f(x): return 2 * x`",
        "```python def f(x): return 2 * x```",
        "def f(x):\n\treturn 2 * x",
        "def f(x):\n    def f(y):\n        return y\n    return 2 * f(x)",
        "    def f(y):\n        return y\n    return 2 * f(x)",
        "@staticmethod\ndef f(x):\n    return 2 * x",
        "import functools\n@functools.lru_cache(\n    maxsize=None)\ndef f(x):\n    return 2 * x",
        "class f:\n    def __new__(cls, x):\n        return 2 * x",
        "    return g(x)\n\ndef g(x):\n    return x * 2\n",
        "```python\ndef f(x):\n    return 2 * x\n    # and so\n    y = (\n```",
        "def f(x):\n    return “a” and 2 * x\n",
        "memo = {}\nmemo[2] = 4\n```python\ndef f(x):\n    return memo[x]\n```",
        "cache = {}\nfor i in range(9):\n    cache[i] = 2 * i\ndef f(x):\n    return cache[x]\n",
        "try:\n    import numpy as m\nexcept ImportError:\n    m = None\ndef f(x):\n"
        "    return 2 * x if m is None else 4\n",
        "def f(x):\n    global n\n    n = 2\n    return n * x\nn = int(input())\n"
        .replace("n = int(input())", ""),
        "def f(x):\n    n = 2\n    return n * x\nn = int(input())\nx = input()\n",
    ],
)  # fmt: skip
def test_odd_but_right_code_is_found(text):
    assert passes(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "I can't do it.",
        "def g(x):\n    return 2 * x",  # another name
        "class A:\n    def f(self, x):\n        return 2 * x",
        "def outer():\n    def f(x):\n        return 2 * x\n    return f",
        "def F(x):\n    return 2 * x",
        "    y = 2 * x\nreturn y",  # the return is not in the function
        "def f(x):\n    return math.floor(2 * x)",  # nobody imports math
        "def f(x)\n    return 2 * x",
        "```python\nprint(2 * 2)\n```",
        "<think>\n```python\ndef f(x):\n    return 2 * x\n```\n</think>\nIt's done.",
        "def f(x):\n    pass\n",
        "```python\ndef f(x):\n    return 2 * x\n```\nBetter:\n```python\ndef f(x):\n    return 3\n```",  # noqa: E501
    ],
)
def test_nothing_becomes_right_by_repair(text):
    assert not passes(text)


def test_async_functions_are_found():
    code = extract_code("```\nasync def f(x):\n    return x\n```", prompt="", entry_point="f")
    assert code == "async def f(x):\n    return x\n"


def test_escaped_text_stays_where_the_code_means_it():
    code = "def f(x):\n    return x.replace('<', '&lt;')"
    assert extract_code(code, prompt="", entry_point="f") == code + "\n"


def test_code_that_is_cut_is_taken_as_far_as_it_parses():
    text = "```python\ndef f(x):\n    y = 2 * x\n    return y\n    if y > (3 +"
    assert extract_code(text, prompt="", entry_point="f").endswith("    return y\n")


def test_what_needs_no_program_is_left_out():
    text = "```python\nimport os\nimport math\nN = 2\nM = print(1)\ndef f(x):\n    return math.floor(N * x)\n```"  # noqa: E501
    code = extract_code(text, prompt="", entry_point="f")
    assert code == "import math\n\nN = 2\n\ndef f(x):\n    return math.floor(N * x)\n"


PIECES = st.sampled_from(
    ["def f(x):\n", "    return x\n", "```python\n", "```\n", "~~~\n", '"""\n', "(", "]", "\n", "> ",  # noqa: E501
     ">>> ", "@", "class f:\n", "<think>", "</think>", "f = ", "lambda", "\t", "'", "\\", "\r", "é",
     "\ud800", "\0", "“", "&lt;", "async ", "if x:\n", "global f\n", "from a import f\n", "`"]
)  # fmt: skip


@settings(max_examples=300, deadline=2000)
@given(
    st.lists(PIECES | st.text(max_size=5), max_size=40).map("".join),
    st.sampled_from(["", PROMPT, "def f(x):\n", "Write f.", "def f(x): return ", "(\n"]),
    st.booleans(),
)
def test_any_text_gives_a_program_soon(text, prompt, truncated):
    code = extract_code(text, prompt=prompt, entry_point="f", truncated=truncated)
    assert code.endswith("\n")
    code.encode()


@pytest.mark.parametrize(
    "unit",
    ["def f(x):\n", "def f(x): return (\n", "```\n", "```\ndef f(x):\n  (\n", 'def f(x):\n    """\n',  # noqa: E501
     "Here's (a = thing\n", "(", "-", "x = 1\n", "x, ", "@x\n", "   def f(x):\n      (\n", "`", "> ",  # noqa: E501
     "`def f(x): (`\n", ">>> def f(x):\n... (\n", "<think>", "<code>", "&lt;", "    return x\n", " ",  # noqa: E501
     "    try:\n        y = 1\n", "\x1b[1;"],
)  # fmt: skip
def test_an_answer_of_100_kilobytes_takes_seconds_at_most(unit):
    text = unit * (100_000 // len(unit))
    since = time.process_time()
    extract_code(text, prompt=PROMPT.replace("total", "f"), entry_point="f")
    assert time.process_time() - since < 10  # two at most on the machine it was written on

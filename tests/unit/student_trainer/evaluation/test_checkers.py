"""Rows say how a completion is judged; published files score as published."""

import re

import pytest

from shared.errors import DatasetError
from student_trainer.data.rows import load_rows
from student_trainer.evaluation.checkers import (
    check_completions,
    parse_checker,
    program_of,
    summarize,
)
from student_trainer.evaluation.suites import problems_of
from tests.support.data import published


def problems(name):
    return problems_of(load_rows(published(name), config=None, split="train"), "auto")


def passed(items, completions):
    return [r.passed for r in check_completions([p.checker for p in items], completions)]


def test_humaneval_canonical_solutions_all_pass():
    items = problems("HumanEval.jsonl.gz")
    assert sum(passed(items, [p.reference for p in items])) == len(items) == 164


def test_humaneval_canonical_solutions_in_a_fence_all_pass():
    items = problems("HumanEval.jsonl.gz")
    fenced = [f"Here it is:\n```python\n{p.row['prompt']}{p.reference}```\nDone." for p in items]
    assert all(passed(items, fenced))


def test_humaneval_solutions_followed_by_chatter_pass():
    items = problems("HumanEval.jsonl.gz")
    assert all(passed(items, [p.reference + "\n\nprint(undefined)\n" for p in items]))


def test_humaneval_mutated_solutions_all_fail():
    items = problems("HumanEval.jsonl.gz")
    mutated = [re.sub(r"\breturn\b.*", "return 'wrong'", p.reference) for p in items]
    assert sum(passed(items, mutated)) == 0
    assert sum(passed(items, ["    return None\n"] * len(items))) == 0


def test_gsm8k_references_are_right_and_other_numbers_are_not():
    items = problems("gsm8k_test.jsonl")
    assert all(passed(items, [p.reference for p in items]))
    assert not any(passed(items, [f"#### {p.checker['answer']}1" for p in items]))


def test_a_truncated_answer_has_no_last_number():
    checker = {"kind": "final_number", "answer": "3"}
    texts = ["So far 3", "So far 3", "#### 3\nSo", "A 3D object"]
    results = check_completions([checker] * 4, texts, truncated=[False, True, True, False])
    assert [r.passed for r in results] == [True, False, True, False]


def test_a_right_function_in_thoughts_that_were_cut_is_no_answer():
    text = "<think>\n```python\ndef f(x):\n    return x\n```\nBut then"
    assert "return x" in program_of(CHECKER, text).code
    assert program_of(CHECKER, text, truncated=True).code.startswith("raise NameError")


def test_as_many_marks_as_completions_are_needed():
    checker = {"kind": "exact_match", "answer": "3"}
    with pytest.raises(ValueError, match="shorter"):
        check_completions([checker] * 2, ["3", "3"], truncated=[True])


def test_exact_match_ignores_only_outer_space():
    checker = {"kind": "exact_match", "answer": "a b"}
    results = check_completions([checker] * 3, [" a b\n", "a  b", "ab"])
    assert [r.passed for r in results] == [True, False, False]


CHECKER = parse_checker(
    {"kind": "python", "prompt": "import math\n\ndef f(x):\n", "entry_point": "f", "test": ""},
    "row",
)


@pytest.mark.parametrize(
    ("completion", "code"),
    [
        ("    return x\n", "    return x\n"),
        ("    return x\ndef g(): pass", "    return x\n"),
        ("    return x\n# note", "    return x\n"),
        ("```python\ndef f(x):\n    return 1\n```", "    return 1\n"),
        ("```\n    return x\n```", "    return x\n"),
        ("    return g(x)\ndef g(x): return x", "    return g(x)\n\ndef g(x): return x\n"),
    ],
)
def test_code_is_taken_from_the_completion(completion, code):
    assert program_of(CHECKER, completion).code == "import math\n\ndef f(x):\n" + code


@pytest.mark.parametrize(
    ("checker", "message"),
    [
        ({"kind": "magic"}, "row 3: checker kind 'magic' is not one of"),
        (
            {"kind": "python", "prompt": "", "test": ""},
            "row 3: a python checker needs 'entry_point'",
        ),
        (
            {"kind": "final_number", "answer": "x"},
            "row 3: the answer 'x' of a final_number checker",
        ),
        ({"kind": "final_number", "answer": 72}, "row 3: a final_number checker needs 'answer'"),
    ],
)
def test_unusable_checkers_are_refused_by_name(checker, message):
    with pytest.raises(DatasetError, match=re.escape(message)):
        parse_checker(checker, "row 3")


def test_shares_are_kept_by_kind():
    checkers = [
        {"kind": "final_number", "answer": "1"},
        {"kind": "final_number", "answer": "2"},
        {"kind": "python", "prompt": "def f():\n", "entry_point": "f",
         "test": "def check(c):\n    assert c() == 1\n"},
    ]  # fmt: skip
    results = check_completions(checkers, ["1", "1", "    return 1"])
    assert summarize(results) == {"pass@1": 1.0, "exact_match": 0.5}
    assert summarize([]) == {}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "x"}, "neither a checker, nor HumanEval's nor GSM8K's fields"),
        ({"checker": 3, "prompt": "x"}, "checker must be an object"),
        ({"checker": {"kind": "exact_match", "answer": "x"}}, "prompt missing"),
    ],
)
def test_rows_of_no_suite_are_refused_by_name(row, message):
    with pytest.raises(DatasetError, match="file:1") as caught:
        problems_of([("file:1", row)], "auto")
    assert message in str(caught.value)

"""Rows with a checker, in every form that is trained on."""

import json

import pytest

from shared.errors import DatasetError
from student_trainer.evaluation.suites import problems_of

CHECKER = {"kind": "exact_match", "answer": "4"}
QUESTION, ANSWER = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]


def problem(**row):
    [found] = problems_of([("rows:1", {"checker": CHECKER, **row})], "auto")
    return found


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [QUESTION, ANSWER]},
        {"messages": json.dumps([QUESTION, ANSWER]), "checker": json.dumps(CHECKER)},
        {"prompt": [QUESTION], "completion": [ANSWER]},
        {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]},
        {"instruction": "2+2?", "input": "", "output": "4"},
    ],
)
def test_forms_of_a_conversation_are_one_problem(row):
    found = problem(**row)
    assert found.row == {"prompt": [QUESTION]}
    assert found.checker == CHECKER
    assert found.reference == "4"
    assert found.answered == {"prompt": [QUESTION], "completion": [ANSWER]}


def test_what_the_template_prints_besides_is_kept():
    called = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add"}}]}
    found = problem(
        messages=[QUESTION, called], tools=json.dumps(TOOLS), system="be brief",
        chat_template_kwargs={"enable_thinking": False},
    )  # fmt: skip
    assert found.row == {
        "prompt": [{"role": "system", "content": "be brief"}, QUESTION],
        "tools": TOOLS,
        "chat_template_kwargs": {"enable_thinking": False},
    }
    assert found.reference == ""
    assert found.answered["completion"] == [called]


def test_plain_text_stays_plain():
    found = problem(prompt="2+2=", completion="4")
    assert (found.row, found.answered) == (
        {"prompt": "2+2="},
        {"prompt": "2+2=", "completion": "4"},
    )
    assert problem(prompt="2+2=").answered is None


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"checker": "{", "prompt": "x"}, "rows:1: checker is text, but not valid JSON"),
        ({"checker": [], "prompt": "x"}, "rows:1: checker must be an object"),
        ({"prompts": "x"}, "rows:1: prompt missing"),
    ],
)
def test_what_cannot_be_read_is_named(row, message):
    with pytest.raises(DatasetError, match=message):
        problem(**row)

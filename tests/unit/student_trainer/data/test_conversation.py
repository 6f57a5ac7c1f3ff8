"""Each form of a row is the same conversation; a flag without effect is refused."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import ConfigurationError, DatasetError
from student_trainer.config.arguments import DataArguments
from student_trainer.data.conversation import (
    SPEAKERS,
    Conversation,
    PlainText,
    check_columns,
    read_row,
)

TALK = [{"role": "user", "content": "add two"}, {"role": "assistant", "content": "return x"}]
READ = Conversation(TALK[:1], TALK[1])


def read(row, **options):
    return read_row("d:1", row, DataArguments(**options))


def error(row, **options):
    with pytest.raises(DatasetError) as caught:
        read(row, **options)
    assert str(caught.value).startswith("d:1: ")
    assert "\n" not in str(caught.value)
    return str(caught.value)


text = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20)


@given(text, text, st.lists(st.tuples(text, text), max_size=2), st.none() | text)
def test_every_form_of_a_conversation_is_read_alike(question, answer, history, system):
    messages = [] if system is None else [{"role": "system", "content": system}]
    for asked, said in [*history, (question, answer)]:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    shared = [{"from": names[m["role"]], "value": m["content"]} for m in messages]
    alpaca = {"instruction": question, "input": "", "output": answer, "history": history}
    forms = [
        {"messages": messages},
        {"messages": json.dumps(messages)},
        {"prompt": messages[:-1], "completion": messages[-1:]},
        {"prompt": json.dumps(messages[:-1]), "completion": json.dumps(messages[-1:])},
        {"prompt": messages[:-1], "completion": answer},
        {"conversations": shared},
        {"conversations": json.dumps(shared)},
        {"conversations": messages},
        {"conversations": [m for m in shared if m["from"] != "system"], "system": system},
        {"messages": [m for m in messages if m["role"] != "system"], "system": system},
        {"messages": messages, "system": system},
        {**alpaca, "system": system},
        {**alpaca, "system": system, "history": json.dumps(history)},
    ]
    expected = Conversation(messages[:-1], messages[-1])
    assert [read(row) for row in forms] == [expected] * len(forms)


def test_the_input_of_an_instruction_is_part_of_the_question():
    row = {"instruction": "Translate.", "input": "eins", "output": "one"}
    expected = Conversation(
        [{"role": "user", "content": "Translate.\n\neins"}], {"role": "assistant", "content": "one"}
    )
    assert read(row) == expected
    assert read(row, prompt_column="instruction", completion_column="output") == expected
    assert read({**row, "output": None}).completion is None
    other = {"instruction": "a", "response": "b"}
    assert read(other, completion_column="response").completion["content"] == "b"


def test_columns_keep_their_rank():
    shared = [{"from": "human", "value": "other"}]
    assert read({"messages": TALK, "prompt": "x", "conversations": shared}) == READ
    assert read({"prompt": "x", "completion": "y", "conversations": shared}) == PlainText("x", "y")
    assert read({"messages": None, "conversations": shared}).prompt[0]["content"] == "other"


@pytest.mark.parametrize("name", [*SPEAKERS, "Human", " GPT "])
def test_speakers_have_many_names(name):
    turns = [{"from": "human", "value": "x"}, {"from": name, "value": "y", "weight": 0}]
    read_as = read({"conversations": turns})
    last = read_as.completion or read_as.prompt[-1]
    assert last == {"role": SPEAKERS[name.strip().lower()], "content": "y", "weight": 0}


def test_tools_and_options_of_the_template_may_be_json():
    tools = [{"type": "function", "function": {"name": "f"}}]
    for value in (tools, json.dumps(tools)):
        assert read({"messages": TALK, "tools": value}).tools == tools
    for empty in (None, "", [], "[]"):
        assert read({"messages": TALK, "tools": empty}).tools is None
    for value in ({"enable_thinking": False}, '{"enable_thinking": false}'):
        row = {"conversations": TALK, "chat_template_kwargs": value}
        assert read(row).template_kwargs == {"enable_thinking": False}
    assert read({"messages": TALK}).template_kwargs == {}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": "hello"}, "messages is text, but not valid JSON"),
        ({"messages": "[]"}, "messages must be a list of at least one message"),
        ({"messages": 3}, "messages must be a list"),
        ({"conversations": []}, "conversations must be a list of at least one message"),
        ({"conversations": {"from": "human"}}, "conversations must be a list"),
        ({"conversations": [{"from": "bot", "value": "x"}]},
         "conversations[0] is from 'bot'; known are system"),
        ({"conversations": [TALK[0], {"from": "gpt"}]},
         "conversations[1] must have 'value' as text, and has none"),
        ({"conversations": [{"from": 3, "value": "x"}]}, "must have 'from' as text, and has int"),
        ({"conversations": ["x"]}, "conversations[0] must be an object"),
        ({"conversations": [{"from": "gpt", "value": "x"}]}, "hold no turn before"),
        ({"instruction": 3}, "instruction must be text, not int"),
        ({"instruction": "x", "input": ["y"]}, "input must be text, not list"),
        ({"instruction": "x", "output": ""}, "the output is empty"),
        ({"instruction": "x", "history": [["a"]]}, "history[0] must be [question, answer]"),
        ({"instruction": "x", "history": 3}, "history must be a list"),
        ({"instruction": "x", "system": 3}, "system must be text"),
        ({"messages": TALK, "tools": "x"}, "tools is text, but not valid JSON"),
        ({"messages": TALK, "tools": {}}, "tools must be a list of functions"),
        ({"messages": TALK, "tools": ["x"]}, "tools[0] must be an object, not str"),
        ({"messages": TALK, "chat_template_kwargs": []}, "chat_template_kwargs must be an object"),
        ({"messages": TALK, "tool": "[{}]"}, "'tool'; did you mean 'tools'?"),
        ({"messages": TALK, "functions": [{}]}, "'functions'; did you mean 'tools'?"),
        ({"messages": TALK, "chat_template_kwarg": {"a": 1}}, "mean 'chat_template_kwargs'?"),
        ({"messages": [*TALK[:1], {"role": "assistant", "content": "y", "weight": 0.5}]},
         "has weight 0.5"),
        ({"messages": [*TALK, TALK[1]]}, "two turns of the assistant"),
        ({"prompt": "x", "tools": [{}]}, "the column tools is for a chat template"),
        ({"prompt": "x", "system": "be kind"}, "the column system is for a chat template"),
        ({"messages": [{"role": "system", "content": "a"}, *TALK], "system": "b"},
         "two system prompts, 'b' and 'a'"),
        ({"prompts": "x"}, "the row has ['prompts']. Did you mean prompts?"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_names_column_and_place(row, message):
    assert message in error(row)


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"messages": TALK, "question": "x"}], {"prompt_column": "question"},
         "--prompt_column question has no effect: the rows hold messages"),
        ([{"question": "x", "answer": "y"}],
         {"prompt_column": "question", "completion_column": "anwser"},
         "--completion_column anwser: no row has this column; the columns are question, answer. "
         "Did you mean answer?"),
        ([{"question": "x"}], {"prompt_column": "qestion"}, "Did you mean question?"),
        ([{"conversations": TALK, "answer": "y"}], {"completion_column": "answer"},
         "--completion_column answer has no effect: the rows hold conversations"),
        ([{"prompt": "x", "answer": None}], {"completion_column": "answer"}, "it is empty"),
        ([{"instruction": "x", "question": None}], {"prompt_column": "question"},
         "the rows hold instruction"),
    ],
)  # fmt: skip
def test_a_flag_for_a_column_without_effect_is_refused(rows, options, message):
    with pytest.raises(ConfigurationError) as caught:
        check_columns([("d:1", row) for row in rows], DataArguments(**options))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("rows", "options"),
    [
        ([{"messages": TALK}], {}),
        ([{"messages": TALK}, {"question": "x"}], {"prompt_column": "question"}),
        ([{"question": "x"}, {"question": "x", "answer": "y"}],
         {"prompt_column": "question", "completion_column": "answer"}),
        ([{"instruction": "x", "output": "y"}],
         {"prompt_column": "instruction", "completion_column": "output"}),
        ([{"instruction": "x", "response": "y"}], {"completion_column": "response"}),
    ],
)  # fmt: skip
def test_a_flag_that_some_row_needs_is_accepted(rows, options):
    check_columns([("d:1", row) for row in rows], DataArguments(**options))

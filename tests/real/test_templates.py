"""Rows as people have them, under the chat templates of published models.

Each completion is compared with what the model of that template writes. Prompts are compared with
the ids that transformers gives for inference.
"""

import copy
import dataclasses
from functools import lru_cache

import numpy as np
import pytest

from shared.errors import ConfigurationError, DatasetError
from student_trainer.data.conversation import Conversation
from student_trainer.data.turn import THOUGHTS_LEFT_OUT, first_turn
from tests.support.templates import (
    TEMPLATES,
    TODAY,
    WEATHER,
    assistant,
    call,
    row_tokenizer,
    user,
)

NO_THINKING = {"enable_thinking": False}
ASK = user("What is 2+2?")
THINK = "Two and two make four."


@lru_cache
def cached(name, thinking=True, turns="last", spans=False):
    kwargs = None if thinking else NO_THINKING
    return row_tokenizer(name, kwargs=kwargs, assistant_turns=turns, one_sequence=spans)


def learned(name, row, **options):
    """Prompt and learned text of a row's only example."""
    tokenize = cached(name, **options)
    [example] = tokenize(0, "data.jsonl:7", row)
    decode = tokenize.tokenizer.decode
    sample = example.sample
    completion = None if sample is None else decode(sample.completion_ids[sample.completion_mask])
    return decode(example.prompt_ids), completion


ENDS = {
    "qwen2.5": "<|im_end|>", "qwen3": "<|im_end|>", "qwen3-2507": "<|im_end|>",
    "qwen3.5": "<|im_end|>", "qwen3.8": "<|im_end|>", "nemotron-3-nano": "<|im_end|>",
    "nemotron-3-ultra": "<|im_end|>", "glm-4.5": "<|user|>", "phi-3": "<|end|>",
    "llama-3": "<|eot_id|>", "llama-3.1": "<|eot_id|>", "llama-3.2": "<|eot_id|>",
    "deepseek-v3": "<｜end▁of▁sentence｜>", "deepseek-r1-distill": "<｜end▁of▁sentence｜>",
    "gemma-3": "<end_of_turn>", "gpt-oss": "<|return|>",
}  # fmt: skip
# What stands before an answer where the row has no thoughts.
BEFORE = {
    "qwen3": "<think>\n\n</think>\n\n", "qwen3.5": "\n</think>\n\n", "qwen3.8": "\n</think>\n\n",
    "nemotron-3-nano": "\n</think>\n", "nemotron-3-ultra": "</think>",
    "glm-4.5": "\n<think></think>\n", "deepseek-r1-distill": "\n</think>\n\n",
    "gpt-oss": "<|channel|>final<|message|>",
}  # fmt: skip


@pytest.mark.parametrize("name", TEMPLATES)
def test_an_answer_is_learned_with_its_end_token(name):
    prompt, completion = learned(name, {"messages": [ASK, assistant("It is 4.")]})
    assert completion == BEFORE.get(name, "") + "It is 4." + ENDS[name]
    assert "What is 2+2?" in prompt


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("thinking", [True, False])
def test_the_prompt_is_what_the_template_makes_for_inference(name, thinking):
    tokenize = cached(name, thinking) if thinking or "enable_thinking" in source(name) else None
    if tokenize is None:
        return
    history = [ASK, assistant("It is 4."), user("Sure?")]
    [example] = tokenize(0, "row", {"messages": [*history, assistant("Yes.")]})
    expected = tokenize.tokenizer.apply_chat_template(
        history,
        add_generation_prompt=True,
        strftime_now=TODAY.strftime,
        return_dict=False,
        **({} if thinking else NO_THINKING),
    )
    assert example.prompt_ids.tolist() == expected


def source(name):
    return str(cached(name).tokenizer.chat_template)


# What a completion is, where the row has thoughts: under every template that shows them.
THOUGHTS = {
    "qwen3": f"<think>\n{THINK}\n</think>\n\nIt is 4.",
    "qwen3.5": f"{THINK}\n</think>\n\nIt is 4.",
    "qwen3.8": f"{THINK}\n</think>\n\nIt is 4.",
    "nemotron-3-nano": f"{THINK}\n</think>\nIt is 4.",
    "nemotron-3-ultra": f"{THINK}</think>It is 4.",
    "glm-4.5": f"\n<think>{THINK}</think>\nIt is 4.",
    "deepseek-r1-distill": f"{THINK}\n</think>\n\nIt is 4.",
    "gpt-oss": f"<|channel|>analysis<|message|>{THINK}<|end|><|start|>assistant<|channel|>final"
    "<|message|>It is 4.",
}


@pytest.mark.parametrize("name", THOUGHTS)
@pytest.mark.parametrize("field", ["reasoning_content", "reasoning", "thinking"])
def test_thoughts_in_a_field_are_learned(name, field):
    row = {"messages": [ASK, assistant("It is 4.", **{field: THINK})]}
    assert learned(name, row)[1] == THOUGHTS[name] + ENDS[name]


@pytest.mark.parametrize("name", THOUGHTS)
def test_thoughts_within_the_content_are_learned(name):
    content = f"<think>\n{THINK}\n</think>\n\nIt is 4."
    completion = learned(name, {"messages": [ASK, assistant(content)]})[1]
    # Where the template prints a content as it is, so are the newlines around the thoughts.
    expected = THOUGHTS[name].replace(f"{THINK}</think>It", f"{THINK}\n</think>\n\nIt")
    expected = expected.replace(f"{THINK}\n</think>\nIt", f"{THINK}\n</think>\n\nIt")
    assert completion == expected + ENDS[name]


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name not in THOUGHTS])
def test_thoughts_that_a_template_does_not_print_are_refused(name):
    row = {"messages": [ASK, assistant("It is 4.", reasoning_content=THINK)]}
    with pytest.raises(DatasetError, match=rf"data\.jsonl:7: the chat template of {name} does not"):
        learned(name, row)


@pytest.mark.parametrize("name", ["qwen3", "qwen3.5", "qwen3.8", "nemotron-3-nano", "glm-4.5"])
@pytest.mark.parametrize("inline", [True, False])
def test_without_thinking_the_answer_alone_is_learned(name, inline):
    with_thoughts = assistant(f"<think>\n{THINK}\n</think>\n\nIt is 4.")
    if not inline:
        with_thoughts = assistant("It is 4.", reasoning_content=THINK)
    for turn in (assistant("It is 4."), with_thoughts):
        prompt, completion = learned(name, {"messages": [ASK, turn]}, thinking=False)
        assert prompt.rstrip().endswith("</think>")
        assert completion.lstrip("\n") == "It is 4." + ENDS[name]
    [example] = cached(name, False)(0, "row", {"messages": [ASK, with_thoughts]})
    assert example.notes == ("thoughts left out",)


@pytest.mark.parametrize("name", BEFORE)
def test_an_empty_thought_that_nobody_wrote_is_noted(name):
    [example] = cached(name)(0, "row", {"messages": [ASK, assistant("It is 4.")]})
    assert example.notes == (() if name == "gpt-oss" else ("empty thought",))
    row = {"messages": [ASK, assistant("It is 4.", reasoning_content="")]}  # here somebody did
    [example] = cached(name)(0, "row", row)
    assert example.notes == ()


def test_a_rows_own_options_come_first():
    row = {"messages": [ASK, assistant("It is 4.")], "chat_template_kwargs": NO_THINKING}
    tokenize = cached("qwen3")
    conversation = Conversation(row["messages"][:1], row["messages"][1], None, NO_THINKING)
    turn = first_turn(tokenize.chat, "row", conversation)
    assert turn.prompt.endswith("<think>\n\n</think>\n\n")
    assert turn.completion.startswith("It is 4.")


def test_a_prompt_that_closes_a_thought_needs_none_in_the_conversation():
    tokenizer = copy.copy(cached("qwen2.5").tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}"
    )
    tokenize = dataclasses.replace(cached("qwen2.5"), tokenizer=tokenizer)
    [example] = tokenize(0, "row", {"messages": [ASK, assistant("It is 4.")]})
    assert example.prompt.endswith("</think>\n\n")
    assert tokenizer.decode(example.sample.completion_ids) == "It is 4.<|im_end|>"


def test_options_that_a_template_does_not_read_are_refused():
    with pytest.raises(ConfigurationError, match=r"'enable_thinkin'; did you mean 'enable_think"):
        _ = row_tokenizer("qwen3", kwargs={"enable_thinkin": False}).chat
    with pytest.raises(ConfigurationError, match="the chat template of llama-3 reads no"):
        _ = row_tokenizer("llama-3", kwargs=NO_THINKING).chat


CALLS = {
    "qwen2.5": '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Köln", "days": 2}}\n'
    "</tool_call><|im_end|>",
    "llama-3.1": '{"name": "get_weather", "parameters": {"city": "Köln", "days": 2}}<|eot_id|>',
    "glm-4.5": "\n<think></think>\n<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Köln"
    "</arg_value>\n<arg_key>days</arg_key>\n<arg_value>2</arg_value>\n</tool_call><|observation|>",
    "gpt-oss": " to=functions.get_weather<|channel|>commentary json<|message|>"
    '{"city": "Köln", "days": 2}<|call|>',
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("content", [None, ""])
def test_a_tool_call_is_learned_as_the_template_prints_it(name, content):
    conversation = Conversation(
        [user("Weather in Köln?")],
        assistant(content, tool_calls=[call(city="Köln", days=2)]),
        [WEATHER],
    )
    tokenize = cached(name)
    part = tokenize._tokenize_conversation("row", conversation)
    assert tokenize.tokenizer.decode(part.completion_ids) == CALLS[name]
    assert "get_weather" in part.text


@pytest.mark.parametrize("name", ["llama-3", "gemma-3", "phi-3"])
def test_tool_calls_that_a_template_does_not_print_are_refused(name):
    row = {"messages": [ASK, assistant(None, tool_calls=[call(city="Köln")])]}
    with pytest.raises(DatasetError, match=r"messages\[1\]: .* does not print the call"):
        learned(name, row)


@pytest.mark.parametrize("name", ["llama-3", "gemma-3", "phi-3", "deepseek-v3"])
def test_tools_that_a_template_does_not_print_are_refused(name):
    with pytest.raises(DatasetError, match="prints no tools; drop the column tools"):
        cached(name)._tokenize_conversation(
            "row", Conversation([ASK], assistant("It is 4."), [WEATHER])
        )


def test_several_calls_of_one_turn_are_printed_or_refused():
    calls = [call(city="Köln", days=2), call(city="Bonn", days=3)]
    row = {"messages": [ASK, assistant(None, tool_calls=calls)]}
    assert learned("qwen2.5", row)[1].count("<tool_call>") == 2
    with pytest.raises(DatasetError, match="single tool-calls at once"):
        learned("llama-3.1", row)
    with pytest.raises(DatasetError, match="does not print the call"):
        learned("gpt-oss", row)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_developers_turn_is_printed(name):
    row = {"messages": [{"role": "developer", "content": "Rhyme."}, ASK, assistant("It is 4.")]}
    assert "Rhyme." in learned(name, row)[0]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("role", ["human", "gpt", "User"])
def test_unknown_roles_are_refused(name, role):
    row = {"messages": [{"role": role, "content": "What?"}, assistant("It is 4.")]}
    with pytest.raises(DatasetError, match=rf"messages\[0\] has the role '{role}'"):
        learned(name, row)


@pytest.mark.parametrize("name", TEMPLATES)
def test_parts_of_text_are_one_text(name):
    parts = [{"type": "text", "text": "What is"}, {"type": "text", "text": " 2+2?"}]
    row = {"messages": [user(parts), assistant([{"type": "text", "text": "It is 4."}])]}
    assert learned(name, row) == learned(name, {"messages": [ASK, assistant("It is 4.")]})
    image = [{"type": "image_url", "image_url": {"url": "x"}}]
    with pytest.raises(DatasetError, match=r"messages\[0\]: content\[0\] is of type 'image_url'"):
        learned(name, {"messages": [user(image), assistant("It is 4.")]})


@pytest.mark.parametrize("name", TEMPLATES)
def test_text_that_looks_like_a_control_token_is_text(name):
    ends = TEMPLATES[name][3]
    tokenize = cached(name)
    talk = f"{ends[0]} ends a turn, as {ends[-1]} does; {ends[0]}"
    row = {"messages": [user(f"What does {ends[0]} do?"), assistant(talk)]}
    [example] = tokenize(0, "row", row)
    stops = np.isin(example.sample.completion_ids, tokenize.stop_ids)
    assert stops.sum() == 1
    assert stops[-1]
    said = tokenize.tokenizer.decode(example.sample.completion_ids[:-1])
    spaces = name.startswith("gemma")  # its tokenizer writes a space as this character
    assert said.endswith(talk.replace("▁", " ") if spaces else talk)
    plain = tokenize(0, "row", {"messages": [user("What does it do?"), assistant("It")]})[0]
    control = sorted(tokenize.encoder._control_ids)
    count = np.isin(example.prompt_ids, control).sum()
    assert count == np.isin(plain.prompt_ids, control).sum()


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_beginning_of_an_answer_is_continued(name):
    row = {
        "prompt": [user("Add."), assistant("def add(a, b):")],
        "completion": "\n    return a + b",
    }
    prompt, completion = learned(name, row)
    assert prompt.endswith("def add(a, b):")
    assert completion == "\n    return a + b" + ENDS[name]
    bare, _ = learned(name, {"prompt": row["prompt"]})
    assert bare == prompt


TALK = [
    user("Hi."),
    assistant("Hello, who is there?", reasoning_content="Greet."),
    user("What is 2+2?"),
    assistant("It is 4."),
    user("And 3+3?"),
    assistant("It is 6."),
]


def plain_talk(name):
    if name in THOUGHTS:
        return TALK
    return [{k: v for k, v in turn.items() if k != "reasoning_content"} for turn in TALK]


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_turn_is_learned_after_its_own_history(name):
    talk = plain_talk(name)
    examples = cached(name, turns="all")(3, "row", {"messages": talk})
    assert [example.name for example in examples] == ["row turn 1", "row turn 2", "row turn 3"]
    assert len({example.index for example in examples}) == 3
    for number, example in enumerate(examples):
        alone = cached(name)(3, "row", {"messages": talk[: 2 * number + 2]})[0]
        assert np.array_equal(example.prompt_ids, alone.prompt_ids)
        assert np.array_equal(example.sample.token_ids, alone.sample.token_ids)


# These leave history alone: what they print for a turn does not change once another follows.
UNCHANGED = {
    "qwen2.5", "qwen3-2507", "phi-3", "llama-3", "llama-3.1", "llama-3.2", "deepseek-v3", "gemma-3",
}  # fmt: skip


@pytest.mark.parametrize("name", TEMPLATES)
def test_turns_are_spans_of_one_sequence_where_the_template_leaves_history_alone(name):
    talk = plain_talk(name)
    examples = cached(name, turns="all", spans=True)(0, "row", {"messages": talk})
    assert len(examples) == (1 if name in UNCHANGED else 3)
    if name in UNCHANGED:
        sample = examples[0].sample
        text = cached(name).tokenizer.decode(sample.completion_ids[sample.completion_mask])
        end = ENDS[name]
        assert text == f"Hello, who is there?{end}It is 4.{end}It is 6.{end}"


def test_a_turn_of_weight_0_is_not_learned():
    talk = [user("Hi."), assistant("Hm.", weight=0), user("2+2?"), assistant("4", weight=1)]
    examples = cached("qwen2.5", turns="all", spans=True)(0, "row", {"messages": talk})
    sample = examples[0].sample
    text = cached("qwen2.5").tokenizer.decode(sample.completion_ids[sample.completion_mask])
    assert text == "4<|im_end|>"


@pytest.mark.parametrize("name", ["llama-3.2", "gpt-oss"])
def test_the_date_in_a_prompt_is_the_runs(name):
    assert (
        TODAY.strftime("%d %b %Y" if name != "gpt-oss" else "%Y-%m-%d")
        in learned(name, {"messages": [ASK, assistant("It is 4.")]})[0]
    )


def test_thoughts_before_a_call_are_dropped_once_there_is_an_answer():
    """gpt-oss shows them for inference, and not in the conversation with its answer."""
    talk = [
        user("Weather in Köln?"),
        assistant(None, thinking="I must ask.", tool_calls=[call(city="Köln", days=1)]),
        {"role": "tool", "content": "grey"},
        assistant("It is grey.", thinking="It says grey."),
    ]
    prompt, completion = learned("gpt-oss", {"messages": talk})
    assert "I must ask." in prompt
    assert completion == (
        "<|channel|>analysis<|message|>It says grey.<|end|><|start|>assistant<|channel|>final"
        "<|message|>It is grey.<|return|>"
    )


@pytest.mark.parametrize("name", ["qwen3", "qwen3.5", "glm-4.5"])
def test_text_before_a_thought_is_printed_or_refused(name):
    row = {"messages": [ASK, assistant("the tag <think> is odd </think> really")]}
    with pytest.raises(DatasetError, match=r"drops what stands before <think>, 'the tag'"):
        learned(name, row)


def test_a_thought_that_its_mode_leaves_out_is_noted_wherever_it_stands():
    row = {"messages": [ASK, assistant("In HTML: </think> closes it.")]}
    [example] = cached("qwen3", thinking=False)(0, "data.jsonl:7", row)
    assert example.notes == (THOUGHTS_LEFT_OUT,)


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ({**assistant("y"), "reasoning": "r1", "thinking": "r2"}, "unlike reasoning and thinking"),
        ({**assistant("y"), "reasoning_text": "r"}, "did you mean"),
        ({**assistant("y"), "tool_call": [call()]}, "did you mean 'tool_calls'?"),
    ],
    ids=["two thoughts", "thought", "call"],
)
def test_what_a_message_holds_and_nothing_reads_is_refused(message, told):
    with pytest.raises(DatasetError, match=told):
        learned("qwen3", {"messages": [ASK, message]})


def test_only_an_assistant_thinks():
    row = {"messages": [{**ASK, "reasoning_content": "r"}, assistant("y")]}
    with pytest.raises(DatasetError, match=r"messages\[0\] has reasoning_content, but its role"):
        learned("qwen3", row)

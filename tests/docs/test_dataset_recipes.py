"""Every row in docs/how-to/datasets.md is read, and what the page says is learned is learned."""

import json
import re
from pathlib import Path

import pytest

from tests.support.templates import row_tokenizer

PAGE = (Path(__file__).parents[2] / "docs" / "how-to" / "datasets.md").read_text()
ROWS = re.findall(r"```json\n(.+?)\n```", PAGE, re.DOTALL)
COLUMNS = {"prompt_column": "question", "completion_column": "answer"}

# What is learned of each row of the page, in its order, under Qwen3's published chat template;
# None of a bare prompt.
_THOUGHT = "<think>\nTwo and two make four.\n</think>\n\n4<|im_end|>"
LEARNED = [
    "<think>\n\n</think>\n\n4<|im_end|>",
    None,
    "<think>\n\n</think>\n\n8<|im_end|>",
    "<think>\n\n</think>\n\n4<|im_end|>",
    "<think>\n\n</think>\n\nvier<|im_end|>",
    " return x + 1<|im_end|>",
    "<think>\n\n</think>\n\n#### 2<|im_end|>",
    "<think>\n\n</think>\n\nIt is 4.<|im_end|>",
    _THOUGHT,
    _THOUGHT,
]


def examples(number, **options):
    row = json.loads(ROWS[number])
    tokenize = row_tokenizer("qwen3", **(COLUMNS if "question" in row else {}), **options)
    decode = tokenize.tokenizer.decode
    made = tokenize(0, "data.jsonl:1", row)
    texts = [
        None
        if one.sample is None
        else decode(one.sample.completion_ids[one.sample.completion_mask])
        for one in made
    ]
    return made, texts


def test_there_is_an_expectation_of_each_row():
    assert len(ROWS) == len(LEARNED)


@pytest.mark.parametrize("number", range(len(LEARNED)))
def test_a_row_is_learned_as_the_page_says(number):
    assert examples(number)[1] == [LEARNED[number]]


def test_all_turns_teach_the_call_of_the_tool_too():
    number = next(n for n, row in enumerate(ROWS) if '"tools"' in row)
    _, texts = examples(number, assistant_turns="all")
    assert len(texts) == 2
    assert '{"name": "add", "arguments": {"a": 2, "b": 2}}' in texts[0]
    assert "It is 4." in texts[1]


def test_all_turns_of_a_conversation_are_learned():
    number = next(n for n, row in enumerate(ROWS) if "And twice that?" in row)
    assert len(examples(number, assistant_turns="all")[1]) == 2


def test_instruction_and_input_are_one_turn_with_an_empty_line_between():
    number = next(n for n, row in enumerate(ROWS) if '"instruction"' in row)
    assert "Translate into German.\n\nfour" in examples(number)[0][0].prompt

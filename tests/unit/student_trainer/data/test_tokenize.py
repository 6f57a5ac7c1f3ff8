"""Rows become token ids and a completion mask; what cannot be learned is refused by name."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from transformers import GenerationConfig

from shared.errors import DatasetError, RowTooLongError
from student_trainer.config.arguments import DataArguments
from student_trainer.data.end_tokens import stop_token_ids
from student_trainer.data.examples import RowTokenizer
from student_trainer.data.rows import load_rows
from student_trainer.data.tokenize import tokenize_rows

MARKED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}A: {% generation %}{{ m['content'] }}"
    "{{ eos_token }}{% endgeneration %}\n{% else %}{{ m['role'] }}: {{ m['content'] }}\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}A: {% endif %}"
)
UNMARKED = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
TALK = [{"role": "user", "content": "add two"}, {"role": "assistant", "content": "return x"}]


def render(tokenizer, row, *, max_length=200, **options):
    stop_ids = tuple(stop_token_ids(tokenizer, None))
    row_tokenizer = RowTokenizer(
        tokenizer, stop_ids, DataArguments(**options), max_length, one_sequence=True
    )
    return tokenize_rows([("data.jsonl:7", row)], row_tokenizer, progress=False)[0]


def learned(tokenizer, example):
    sample = example.sample
    return tokenizer.decode(sample.completion_ids[sample.completion_mask])


def test_last_assistant_turn_is_the_completion_and_ends_with_eos(tokenizer):
    tokenizer.chat_template = UNMARKED
    example = render(tokenizer, {"messages": TALK})
    assert example.prompt == "user: add two\nA: "
    assert learned(tokenizer, example) == "return x" + tokenizer.eos_token
    assert example.sample.completion_ids[-1] == tokenizer.eos_token_id


def test_text_after_the_end_of_turn_is_not_learned(tokenizer):
    tokenizer.chat_template = UNMARKED  # prints a newline behind every turn
    example = render(tokenizer, {"messages": TALK})
    assert "\n" not in learned(tokenizer, example)


def test_eos_is_learned_even_when_it_is_the_pad_token(tokenizer):
    tokenizer.chat_template = UNMARKED
    tokenizer.pad_token = tokenizer.eos_token
    example = render(tokenizer, {"messages": TALK})
    assert example.sample.completion_mask[-1]
    assert example.sample.completion_ids[-1] == tokenizer.pad_token_id


def test_plain_prompt_and_completion_get_an_eos(tokenizer):
    example = render(tokenizer, {"prompt": "def f(x):", "completion": " return x"})
    assert learned(tokenizer, example) == " return x" + tokenizer.eos_token
    assert tokenizer.decode(example.prompt_ids) == "def f(x):"


def test_messages_win_over_a_prompt_beside_them(tokenizer):
    tokenizer.chat_template = UNMARKED
    example = render(tokenizer, {"prompt": "something else", "messages": TALK})
    assert example.prompt == "user: add two\nA: "


def test_conversational_prompt_and_completion(tokenizer):
    tokenizer.chat_template = UNMARKED
    row = {"prompt": TALK[:1], "completion": TALK[1:]}
    assert learned(tokenizer, render(tokenizer, row)) == "return x" + tokenizer.eos_token


def test_renamed_text_columns_become_turns(tokenizer):
    tokenizer.chat_template = UNMARKED
    row = {"question": "add two", "answer": "return x"}
    example = render(tokenizer, row, prompt_column="question", completion_column="answer")
    assert example.prompt == "user: add two\nA: "
    assert learned(tokenizer, example) == "return x" + tokenizer.eos_token


def test_a_bare_prompt_has_no_sample(tokenizer):
    tokenizer.chat_template = UNMARKED
    assert render(tokenizer, {"messages": TALK[:1]}).sample is None


def test_assistant_only_loss_learns_every_assistant_turn(tokenizer):
    tokenizer.chat_template = MARKED
    example = render(tokenizer, {"messages": TALK + TALK}, assistant_only_loss=True)
    assert learned(tokenizer, example) == ("return x" + tokenizer.eos_token) * 2
    assert not example.sample.completion_mask.all()
    assert example.prompt.endswith("user: add two\nA: ")  # on-policy: up to the last turn


@pytest.mark.parametrize("template", [MARKED, UNMARKED])
def test_all_assistant_turns_are_learned_with_markers_and_without(tokenizer, template):
    tokenizer.chat_template = template
    example = render(tokenizer, {"messages": TALK + TALK}, assistant_turns="all")
    assert learned(tokenizer, example) == ("return x" + tokenizer.eos_token) * 2


def test_a_long_completion_is_cut_and_says_so(tokenizer):
    whole = render(tokenizer, {"prompt": "def f(x):", "completion": "return x + 1"})
    limit = len(whole.sample.token_ids) - 2
    cut = render(tokenizer, {"prompt": "def f(x):", "completion": "return x + 1"}, max_length=limit)
    assert cut.sample.truncated
    assert np.array_equal(cut.sample.token_ids, whole.sample.token_ids[:limit])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "x" * 400, "completion": "y"}, "leaves none for a completion"),
        ({"prompt": "x", "completion": ""}, "the completion is empty"),
        ({"text": "x"}, "neither messages nor 'prompt'"),
        ({"messages": []}, "at least one message"),
        ({"messages": [{"content": "x"}]}, "role, content"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "no turn before"),
        ({"prompt": "x", "completion": 3}, "must both be text"),
        ({"prompt": "x", "checker": 3}, "checker must be an object"),
        ({"messages": [TALK[0], {"role": "assistant", "content": " "}]}, "completion is empty"),
    ],
)
def test_rows_that_leave_nothing_to_learn_are_refused_by_name(tokenizer, row, message):
    tokenizer.chat_template = UNMARKED
    with pytest.raises(DatasetError, match=r"data\.jsonl:7") as caught:
        render(tokenizer, row, max_length=60)
    assert message in str(caught.value)


def test_a_conversation_without_a_template_is_refused(tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(DatasetError, match="no chat template"):
        render(tokenizer, {"messages": TALK})


def test_a_template_that_rewrites_the_prompt_is_refused(tokenizer):
    tokenizer.chat_template = (
        "{% if add_generation_prompt %}ask {{ messages[0]['content'] }}"
        "{% else %}told {{ messages[0]['content'] }} {{ messages[-1]['content'] }}{% endif %}"
    )
    with pytest.raises(DatasetError, match="does not begin with the prompt"):
        render(tokenizer, {"messages": TALK})


def test_malformed_line_is_named_with_file_and_number(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a"}\n\n{"prompt": \n')
    with pytest.raises(DatasetError, match=r"rows\.jsonl:3: .* Expecting value at column 12$"):
        load_rows(str(path), config=None, split="train")


def test_line_that_is_no_object_is_named(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_text("[1]\n")
    with pytest.raises(DatasetError, match=r"rows\.jsonl:1: expected a JSON object"):
        load_rows(str(path), config=None, split="train")


def test_folder_and_gzip_are_read_in_order(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "1"}))
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write(json.dumps({"prompt": "2"}))
    rows = load_rows(str(tmp_path), config=None, split="train")
    assert [row["prompt"] for _, row in rows] == ["1", "2"]


@pytest.mark.parametrize("name", ["missing.jsonl", "./missing", "/no/such/folder"])
def test_missing_file_is_refused(name: str):
    with pytest.raises(DatasetError, match="no such file or folder"):
        load_rows(name, config=None, split="train")


def test_empty_dataset_is_refused(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n")
    with pytest.raises(DatasetError, match="holds no rows"):
        load_rows(str(path), config=None, split="train")


def test_stop_ids_join_tokenizer_and_model(tokenizer):
    config = GenerationConfig(eos_token_id=[7, 5])
    assert stop_token_ids(tokenizer, config) == sorted({tokenizer.eos_token_id, 5, 7})


def test_a_turn_that_ends_with_another_token_than_eos_is_refused_with_the_remedy(tokenizer):
    tokenizer.chat_template = UNMARKED.replace("{{ eos_token }}", "<|turn|>")
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|turn|>"]})
    with pytest.raises(DatasetError, match=r"data\.jsonl:7: .*Pass --eos_token '<\|turn\|>'"):
        render(tokenizer, {"messages": TALK})
    tokenizer.eos_token = "<|turn|>"
    assert learned(tokenizer, render(tokenizer, {"messages": TALK})) == "return x<|turn|>"


def test_a_template_without_an_end_of_turn_gets_an_eos(tokenizer):
    tokenizer.chat_template = UNMARKED.replace("{{ eos_token }}", "")
    example = render(tokenizer, {"messages": TALK})
    assert learned(tokenizer, example) == "return x\n" + tokenizer.eos_token


def test_long_rows_are_left_out_only_when_told_so(tokenizer):
    tokenizer.chat_template = UNMARKED
    long = [{"role": "user", "content": "x" * 300}, TALK[1]]
    rows = [("d:1", {"messages": TALK}), ("d:2", {"messages": long}), ("d:3", {"messages": TALK})]

    def examples(rows, **options):
        row_tokenizer = RowTokenizer(tokenizer, (1,), DataArguments(), 200)
        return tokenize_rows(rows, row_tokenizer, progress=False, **options)

    with pytest.raises(RowTooLongError, match=r"d:2: the prompt has .*\. Shorten it"):
        examples(rows)
    kept = examples(rows, skip_long_rows=True)
    assert [(example.index, example.name) for example in kept] == [(0, "d:1"), (2, "d:3")]
    with pytest.raises(DatasetError, match=r"every row is too long\. The last one: d:2"):
        examples(rows[1:2], skip_long_rows=True)

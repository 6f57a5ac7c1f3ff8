"""The tokens that end plain text and turns of pretrained models."""

import json

import pytest

from student_trainer.commands.main import main
from student_trainer.config.arguments import ModelArguments
from student_trainer.model.load import load_stop_ids, load_text_end, load_tokenizer
from tests.support.real import model_folder


@pytest.mark.parametrize(
    ("name", "turn", "text"),
    [
        ("gemma-3-270m", "<end_of_turn>", "<eos>"),  # a base model with its chat model's tokenizer
        ("qwen2.5-coder-0.5b", "<|im_end|>", None),
    ],
)
def test_plain_text_and_turns_end_as_the_model_writes_them(name, turn, text):
    arguments = ModelArguments(str(model_folder(name)))
    tokenizer = load_tokenizer(arguments)
    assert tokenizer.convert_ids_to_tokens(load_stop_ids(arguments, tokenizer)[0]) == turn
    end = load_text_end(arguments, tokenizer)
    assert (None if end is None else tokenizer.convert_ids_to_tokens(end)) == text


def test_a_base_model_learns_to_end_its_texts_with_its_own_token(tmp_path, capsys):
    rows = [
        {"prompt": "The capital of France is", "completion": " Paris."},
        {"prompt": "a <table> of", "completion": " two\n\n rows"},
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--model_name_or_path", str(model_folder("gemma-3-270m")), "--dry_run",
             "--dataset_name", str(file), "--output_dir", str(tmp_path / "out"),
             "--max_length", "64"]  # fmt: skip
    assert main(["sft", *words]) == 0
    shown = capsys.readouterr().out
    assert "<bos>The capital of France is[[ Paris.<eos>]]" in shown
    assert "end_of_turn" not in shown


def test_a_trained_base_model_keeps_the_end_of_its_texts(tmp_path):
    """A second run on the output folder ends text as the first did."""
    file = tmp_path / "rows.jsonl"
    row = {"prompt": "Two and two are", "completion": " four."}
    file.write_text(json.dumps(row) + "\n")
    # By SGD, as AdamW's moments are 1 GB of the checkpoint.
    words = ["--model_name_or_path", str(model_folder("gemma-3-270m")), "--torch_dtype", "bfloat16",
             "--dataset_name", str(file), "--output_dir", str(tmp_path / "out"),
             "--max_steps", "1", "--report_to", "none", "--save_strategy", "steps",
             "--save_steps", "1", "--optim", "sgd"]  # fmt: skip
    assert main(["sft", *words]) == 0
    for folder in (tmp_path / "out", tmp_path / "out" / "checkpoint-1"):
        arguments = ModelArguments(str(folder))
        tokenizer = load_tokenizer(arguments)
        assert tokenizer.convert_ids_to_tokens(load_text_end(arguments, tokenizer)) == "<eos>"

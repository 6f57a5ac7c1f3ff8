"""Fingerprints change with what they stand for, and with nothing else."""

import hashlib
import json

import numpy as np
import pytest

from shared.identity import model_fingerprint, tokenizer_identity, vocabulary_fingerprint
from tests.support.models import save_model, save_tokenizer


def test_the_order_of_a_vocabulary_does_not_matter():
    words = {f"word{i}": i for i in range(50)}
    reversed_ = dict(reversed(words.items()))
    assert vocabulary_fingerprint(words) == vocabulary_fingerprint(reversed_)


def test_the_fingerprint_is_the_published_hash():
    expected = hashlib.sha256(b'["a", 0]\n["b\\n", 1]\n').hexdigest()
    assert vocabulary_fingerprint({"b\n": 1, "a": 0}) == expected


@pytest.mark.parametrize(
    "other",
    [
        {"a": 1, "b": 0},
        {"a": 0, "b": 2},
        {"a": 0},
        {"a": 0, "b": 1, "c": 2},
        {'a", 0]\n["b': 1},
        {"a": 0, "B": 1},
    ],
)
def test_any_other_vocabulary_has_another_fingerprint(other):
    assert vocabulary_fingerprint({"a": 0, "b": 1}) != vocabulary_fingerprint(other)


def test_a_tokenizer_is_identified_with_its_added_and_special_tokens(tmp_path):
    tokenizer = save_tokenizer(tmp_path)
    before = tokenizer_identity(tokenizer)
    assert before.vocab_size == 260
    assert before.special_token_ids == {"eos_token": 1, "pad_token": 0}
    assert before.chat_template == tokenizer.chat_template
    tokenizer.add_tokens(["<extra>"])
    after = tokenizer_identity(tokenizer)
    assert after.vocab_size == 261
    assert after.fingerprint != before.fingerprint


def test_a_chat_template_does_not_change_the_fingerprint(tmp_path):
    tokenizer = save_tokenizer(tmp_path)
    before = tokenizer_identity(tokenizer)
    tokenizer.chat_template = "{{ messages }}"
    after = tokenizer_identity(tokenizer)
    assert after.fingerprint == before.fingerprint
    assert after.chat_template == "{{ messages }}"


def test_a_model_is_identified_by_weights_and_configuration(tmp_path):
    for name, seed in (("one", 1), ("same", 1), ("other", 2)):
        save_model(tmp_path / name, seed=seed)
    one = model_fingerprint(tmp_path / "one")
    assert model_fingerprint(tmp_path / "same") == one
    assert model_fingerprint(tmp_path / "other") != one
    config = json.loads((tmp_path / "same" / "config.json").read_text())
    config["rms_norm_eps"] = 0.5
    (tmp_path / "same" / "config.json").write_text(json.dumps(config))
    assert model_fingerprint(tmp_path / "same") != one


def test_files_that_are_not_the_model_do_not_matter(tmp_path):
    save_model(tmp_path)
    before = model_fingerprint(tmp_path)
    (tmp_path / "README.md").write_text("notes")
    assert model_fingerprint(tmp_path) == before


def test_a_large_file_is_sampled_and_training_still_shows(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    weights = tmp_path / "model.safetensors"
    values = np.zeros(100 << 18, np.float32)  # 100 MiB
    values.tofile(weights)
    before = model_fingerprint(tmp_path)
    (values + 1).tofile(weights)
    assert model_fingerprint(tmp_path) != before


def test_a_folder_without_configuration_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        model_fingerprint(tmp_path)

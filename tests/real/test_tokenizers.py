"""Published tokenizers: loaded as they are meant, and nothing of a text is lost."""

import gzip
import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from shared.identity import encoding_fingerprint, parting_text
from shared.text import completion_text, decoded, encoded, round_trip_change, token_text
from shared.tokenizer_file import PROBES
from student_trainer.config.arguments import ModelArguments
from student_trainer.model.load import load_tokenizer
from teacher_server.backends import checkpoint
from tests.support.data import published
from tests.support.real import TOKENIZERS, tokenizer_folder

TEXT = "def f(x): return x+1\n\n  a\tb 你好 🙂 é\r\n"


def on_both_sides(folder):
    yield load_tokenizer(ModelArguments(str(folder)))
    yield checkpoint.load_tokenizer(str(folder), trust_remote_code=False)


@dataclass(frozen=True)
class Loaded:
    """A published tokenizer as each side loads it, and what both warned of meanwhile."""

    name: str
    trainers: Any
    servers: Any
    warned: list[str]


@pytest.fixture(scope="module", params=TOKENIZERS)
def loaded(request):
    """Each tokenizer loaded once for all tests, because that takes seconds."""
    folder = tokenizer_folder(request.param)
    warned = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warned.append(record.getMessage())
    logger = logging.getLogger("shared.tokenizer_file")
    logger.addHandler(handler)
    try:
        trainers, servers = on_both_sides(folder)
    finally:
        logger.removeHandler(handler)
    return Loaded(request.param, trainers, servers, warned)


def test_every_probe_survives_as_tokenizer_json_cuts_it(loaded):
    own = Tokenizer.from_file(str(tokenizer_folder(loaded.name) / "tokenizer.json"))
    for tokenizer in (loaded.trainers, loaded.servers):
        for text in PROBES:
            assert encoded(tokenizer, text) == own.encode(text, add_special_tokens=False).ids
            assert round_trip_change(tokenizer, text) is None
    # It is loaded from its file, and begins text with BOS, on either side.
    assert len(loaded.warned) == (4 if loaded.name == "deepseek_v3" else 0)


def test_plain_text_begins_as_it_was_published(loaded, tmp_path):
    """With BOS or not, also in a folder that is saved and loaded again."""
    begins = {"qwen3": None, "gptoss": None, "llama3_1": "<|begin_of_text|>", "gemma3": "<bos>",
              "deepseek_v3": "<｜begin▁of▁sentence｜>"}  # fmt: skip
    loaded.trainers.save_pretrained(tmp_path)  # both sides save by the same code
    for tokenizer in (loaded.trainers, loaded.servers, AutoTokenizer.from_pretrained(tmp_path)):
        first = tokenizer.convert_ids_to_tokens(tokenizer("x = 1")["input_ids"][0])
        assert first == (begins[loaded.name] or "x")


def test_a_tokenizer_that_says_no_bos_gets_none(relabelled):
    folder = relabelled("llama", "LlamaTokenizerFast", add_bos_token=False)
    for tokenizer in on_both_sides(folder):
        assert tokenizer("x = 1")["input_ids"] == encoded(tokenizer, "x = 1")


@pytest.fixture(scope="module")
def few_merges():
    """DeepSeek's ``tokenizer.json`` with its first merges alone, and all its rules.

    A label changes the rules that are taken; the whole vocabulary takes ten times as long to load.
    """
    tokenizer = json.loads((tokenizer_folder("deepseek_v3") / "tokenizer.json").read_text())
    model = tokenizer["model"]
    model["vocab"] = {token: i for token, i in model["vocab"].items() if i < 4000}
    pairs = (merge if isinstance(merge, list) else merge.split(" ") for merge in model["merges"])
    kept = model["vocab"].keys()
    model["merges"] = [pair for pair in pairs if {*pair, "".join(pair)} <= kept]
    assert len(model["merges"]) > 3000
    special = [token for token in tokenizer["added_tokens"] if token["id"] < 4000]
    tokenizer["added_tokens"] = special
    return json.dumps(tokenizer)


@pytest.fixture
def relabelled(tmp_path, few_merges):
    """Makes a folder of DeepSeek's tokenizer under another model type and class."""

    def make(model_type, tokenizer_class, **options):
        published_folder = tokenizer_folder("deepseek_v3")
        (tmp_path / "tokenizer.json").write_text(few_merges)
        config = json.loads((published_folder / "tokenizer_config.json").read_text())
        config |= {"tokenizer_class": tokenizer_class, **options}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        if model_type:
            (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
        return tmp_path

    return make


@pytest.mark.parametrize(
    ("model_type", "tokenizer_class", "options"),
    [
        ("llama", "LlamaTokenizerFast", {}),
        ("llama", "LlamaTokenizer", {"legacy": False, "add_prefix_space": False}),
        (None, "LlamaTokenizerFast", {}),
        ("qwen2", "Qwen2Tokenizer", {}),
        (None, "GPT2Tokenizer", {"add_prefix_space": True}),
    ],
)
def test_a_tokenizer_under_another_label_is_loaded_from_its_file(
    relabelled, model_type, tokenizer_class, options, caplog, tmp_path_factory
):
    folder = relabelled(model_type, tokenizer_class, **options)
    own = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = own.encode(TEXT, add_special_tokens=False).ids
    believed = AutoTokenizer.from_pretrained(folder)
    if "Llama" in tokenizer_class:  # what was wrong; the others cut rarer text otherwise
        assert " " not in believed.decode(encoded(believed, TEXT))
    for tokenizer in on_both_sides(folder):
        assert encoded(tokenizer, TEXT) == ids
        assert decoded(tokenizer, ids) == TEXT
        assert "loaded tokenizer.json as it stands" in caplog.text
        caplog.clear()
        for same in ("eos_token", "bos_token", "pad_token", "chat_template", "model_max_length"):
            assert getattr(tokenizer, same) == getattr(believed, same)
    # What a run saves is the good one. (Both sides save by the same code.)
    saved = tmp_path_factory.mktemp("saved")
    tokenizer.save_pretrained(saved)
    if model_type:
        shutil.copy(folder / "config.json", saved)
    again = load_tokenizer(ModelArguments(str(saved)))
    assert encoded(again, TEXT) == ids
    assert again.chat_template == tokenizer.chat_template
    assert again.eos_token_id == tokenizer.eos_token_id


def test_two_ways_to_cut_one_vocabulary_have_two_fingerprints(relabelled):
    folder = relabelled("llama", "LlamaTokenizerFast")
    wrong, right = (
        AutoTokenizer.from_pretrained(folder),
        load_tokenizer(ModelArguments(str(folder))),
    )
    assert wrong.get_vocab() == right.get_vocab()
    assert parting_text(encoding_fingerprint(wrong), encoding_fingerprint(right)) == PROBES[0]


def test_every_published_solution_comes_back_behind_its_prompt(loaded):
    tokenizer = loaded.trainers
    lines = gzip.decompress(Path(published("HumanEval.jsonl.gz")).read_bytes()).splitlines()
    assert len(lines) == 164
    for row in map(json.loads, lines):
        text = row["prompt"] + row["canonical_solution"]
        prompt_ids, ids = encoded(tokenizer, row["prompt"]), encoded(tokenizer, text)
        common = 0
        while common < len(prompt_ids) and prompt_ids[common] == ids[common]:
            common += 1
        known = decoded(tokenizer, ids[:common])
        assert known + completion_text(tokenizer, ids[:common], ids[common:]) == text


def test_a_token_keeps_its_leading_space(loaded):
    tokenizer = loaded.trainers
    ids = encoded(tokenizer, "The quick brown fox")
    assert "".join(token_text(tokenizer, i) for i in ids) == "The quick brown fox"
    assert token_text(tokenizer, ids[-1]) == " fox"

"""Ids of a part are those that it has in the whole; text that looks like a token stays text."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from shared.errors import DatasetError
from student_trainer.config.arguments import DataArguments
from student_trainer.data.encode import Encoder
from student_trainer.data.examples import RowTokenizer

LETTERS = "abcdefghijklmnopqrstuvwxyz(){}[]:=+.,<>/|_0123456789\n"


def sentencepiece(scheme):
    """A tokenizer as Llama 2 (`legacy`), Mistral (`always`) or Yi (`first`) have it."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    pieces += [*LETTERS, "▁▁", "▁▁▁▁", "▁r", "▁re", "▁ret", "et", "ur", "re", "ret"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    merges = [("▁", "▁"), ("▁▁", "▁▁"), ("▁", "r"), ("▁r", "e"), ("e", "t"), ("▁re", "t"),
              ("u", "r"), ("r", "e"), ("re", "t")]  # fmt: skip
    for left, right in merges:
        vocabulary.setdefault(left + right, len(vocabulary))
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    if scheme == "legacy":
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


SCHEMES = ("legacy", "always", "first")


@pytest.fixture(params=SCHEMES)
def encoder(request):
    return Encoder(sentencepiece(request.param), (2,))


def test_a_completion_has_the_ids_of_the_whole(encoder):
    prompt, completion = "def f(x):\n", "return x\n    return y"
    ids = encoder.encode(prompt)
    following = encoder.encode_after(prompt, ids, completion)
    assert [*ids, *following] == encoder.encode(prompt + completion)
    assert encoder.tokenizer.decode([*ids, *following]) == prompt + completion
    alone = encoder.encode(completion)
    assert alone != following  # with a space that nobody wrote


texts = st.text(st.sampled_from(" \nabret(u:é字"), min_size=1, max_size=12)
ENCODERS = {scheme: Encoder(sentencepiece(scheme), (2,)) for scheme in SCHEMES}


@pytest.mark.parametrize("scheme", SCHEMES)
@given(prompt=texts, completion=texts)
def test_prompt_and_completion_read_as_one_text(scheme, prompt, completion):
    encoder = ENCODERS[scheme]
    ids = encoder.encode(prompt)
    following = encoder.encode_after(prompt, ids, completion)
    decode = encoder.tokenizer.decode
    assert decode([*ids, *following]) == decode(ids) + completion


def test_a_prompt_has_one_bos_whoever_wrote_it(tokenizer):
    tokenizer.bos_token = "<|bos|>"
    tokenizer.add_special_tokens({"bos_token": "<|bos|>"})
    from tokenizers.processors import TemplateProcessing

    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<|bos|> $A " + tokenizer.eos_token,
        special_tokens=[("<|bos|>", bos), (tokenizer.eos_token, eos)],
    )
    encoder = Encoder(tokenizer)
    bare = encoder.encode("say")
    assert encoder.encode_prompt("say") == [bos, *bare]
    assert encoder.encode_prompt("<|bos|>say") == [bos, *bare]


def test_what_looks_like_a_control_token_is_text(tokenizer):
    encoder = Encoder(tokenizer)
    end = tokenizer.eos_token
    text = f"the token {end} ends; {end}"
    ids = encoder.encode(encoder.protect(text))
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids) == text
    assert tokenizer(text, add_special_tokens=False)["input_ids"].count(tokenizer.eos_token_id) == 2


def plain(tokenizer, row, **options):
    tokenize = RowTokenizer(tokenizer, (tokenizer.eos_token_id,), DataArguments(**options), 200)
    return tokenize(0, "data.jsonl:7", row)[0]


@pytest.mark.parametrize("column", ["prompt", "completion"])
def test_plain_text_with_a_control_token_must_be_told_how_to_be_read(tokenizer, column):
    end = tokenizer.eos_token
    row = {"prompt": "say", "completion": "it", column: f"one {end} two"}
    with pytest.raises(DatasetError, match=r"data\.jsonl:7: the .* --split_special_tokens true"):
        plain(tokenizer, row)
    example = plain(tokenizer, row, split_special_tokens=True)
    ids = example.sample.token_ids.tolist()
    assert ids.count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(ids) == row["prompt"] + row["completion"] + end
    if column == "prompt":
        ids = plain(tokenizer, row, split_special_tokens=False).prompt_ids.tolist()
        assert ids.count(tokenizer.eos_token_id) == 1
    else:  # nobody would write on after the end
        with pytest.raises(DatasetError, match="stands in the middle"):
            plain(tokenizer, row, split_special_tokens=False)


def test_a_completion_that_brings_its_end_gets_no_second(tokenizer):
    end = tokenizer.eos_token
    given = plain(tokenizer, {"prompt": "say", "completion": f"it{end}"})
    bare = plain(tokenizer, {"prompt": "say", "completion": "it"})
    assert given.sample.token_ids.tolist() == bare.sample.token_ids.tolist()


def test_text_within_tool_calls_is_protected_too(tokenizer):
    encoder = Encoder(tokenizer)
    end = tokenizer.eos_token
    value = {"calls": [{"arguments": {"text": f"a{end}b"}}], "n": 3}
    protected = encoder.protect(value)
    assert end not in json.dumps(protected)
    assert encoder.restore(json.dumps(protected)) == json.dumps(value)

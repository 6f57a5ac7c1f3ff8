"""Text of a part of the tokens: what it adds to what stands before it."""

import gzip
import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import DatasetError
from shared.text import (
    GrowingText,
    StopSearch,
    StopStrings,
    check_round_trip,
    completion_text,
    decoded,
    encoded,
    round_trip_change,
    token_pieces,
    token_text,
)
from tests.support.data import published
from tests.support.models import save_tokenizer
from tests.support.sentencepiece import KINDS, sentencepiece

TEXTS = st.text(
    st.one_of(st.sampled_from(" \n\tab<>/s\ufffd"), st.characters(codec="utf-8")), max_size=40
)


@pytest.fixture(scope="module", params=["bytes", *KINDS])
def tokenizer(request, tmp_path_factory):
    if request.param == "bytes":
        return save_tokenizer(tmp_path_factory.mktemp("bytes"))
    return sentencepiece(request.param)


@given(text=TEXTS, place=st.integers(0, 200))
def test_prompt_and_completion_make_the_whole_text(tokenizer, text, place):
    ids = encoded(tokenizer, text)
    whole = decoded(tokenizer, ids, skip_special_tokens=False)
    place = min(place, len(ids))
    before = decoded(tokenizer, ids[:place], skip_special_tokens=False)
    after = completion_text(tokenizer, ids[:place], ids[place:], skip_special_tokens=False)
    if whole.startswith(before):
        assert before + after == whole
    else:  # a character is cut: it belongs to the completion, which ends it
        assert whole.endswith(after)
        assert before.rstrip("\ufffd") + after == whole or "\ufffd" in text


@given(
    text=TEXTS, prompt=st.sampled_from(["", "a", "x = ", "é", "line\n"]), limit=st.integers(0, 9)
)
def test_a_growing_text_and_its_pieces_are_the_text(tokenizer, text, prompt, limit):
    prompt_ids, ids = encoded(tokenizer, prompt), encoded(tokenizer, text)
    ids = ids[: len(ids) - limit] if limit < len(ids) else ids  # often ends in half a character
    expected = completion_text(tokenizer, prompt_ids, ids, skip_special_tokens=False)
    growing = GrowingText(tokenizer, prompt_ids, skip_special_tokens=False)
    parts = [growing.add(token_id) for token_id in ids]
    parts.append(growing.end())
    assert "".join(parts) == growing.text == expected
    assert "".join(token_pieces(tokenizer, prompt_ids, ids)) == expected


@given(ids=st.lists(st.integers(0, 259), max_size=60), place=st.integers(0, 60))
def test_bytes_in_any_order_grow_to_a_text_of_the_same_characters(tokenizer, ids, place):
    prompt, rest = ids[:place], ids[place:]
    growing = GrowingText(tokenizer, prompt)
    for token_id in rest:
        growing.add(token_id)
    growing.end()
    whole = completion_text(tokenizer, prompt, rest)
    assert growing.text.replace("\ufffd", "") == whole.replace("\ufffd", "")


@given(prompt=TEXTS, length=st.integers(60, 400))
def test_a_long_prompt_changes_nothing(tokenizer, prompt, length):
    prompt_ids = encoded(tokenizer, "word " * length + prompt + ":")
    ids = encoded(tokenizer, "x = é")
    short = completion_text(tokenizer, prompt_ids, ids)
    full = decoded(tokenizer, [*prompt_ids, *ids])
    assert full == decoded(tokenizer, prompt_ids) + short


def test_the_work_does_not_grow_with_the_prompt(tokenizer):
    class Counting:
        seen = 0

        def __getattr__(self, name):
            return getattr(tokenizer, name)

        def decode(self, ids, **options):
            Counting.seen += len(ids)
            return tokenizer.decode(ids, **options)

    completion_text(Counting(), encoded(tokenizer, "word " * 5000), encoded(tokenizer, "x"))
    assert Counting.seen < 60


@pytest.mark.parametrize("kind", KINDS)
def test_a_sentencepiece_completion_keeps_its_first_space(kind):
    tokenizer = sentencepiece(kind)
    ids = encoded(tokenizer, "The quick brown fox")
    place = next(i for i in range(1, len(ids)) if decoded(tokenizer, ids[:i]) == "The quick")
    assert completion_text(tokenizer, ids[:place], ids[place:]) == " brown fox"
    if kind != "yi":
        assert decoded(tokenizer, ids[place:]) == "brown fox"  # what was wrong
    brown = ids[place]
    assert token_text(tokenizer, brown).startswith(" ")


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_at_the_boundary_are_no_text(kind):
    tokenizer = sentencepiece(kind)
    end, ids = tokenizer.eos_token_id, encoded(tokenizer, "The fox is")
    place = next(i for i in range(1, len(ids)) if decoded(tokenizer, ids[:i]) == "The fox")
    prompt, rest = ids[:place], ids[place:]
    assert completion_text(tokenizer, [*prompt, end], rest) == " is"
    assert completion_text(tokenizer, prompt, [end, *rest, end]) == " is"
    assert completion_text(tokenizer, [*prompt, *[end] * 100], rest) == " is"
    shown = completion_text(tokenizer, prompt, [*rest, end], skip_special_tokens=False)
    assert shown == " is</s>"
    bos = tokenizer.bos_token_id
    assert completion_text(tokenizer, [bos], ids) == "The fox is"


@pytest.mark.parametrize("kind", KINDS)
def test_half_a_character_takes_no_whole_one_with_it(kind):
    tokenizer = sentencepiece(kind)
    prompt, ids = encoded(tokenizer, "a"), encoded(tokenizer, "x你好")[-6:]
    assert completion_text(tokenizer, prompt, ids) == "你好"
    assert completion_text(tokenizer, prompt, ids[:-1]) == "你\ufffd"
    assert tokenizer.decode([*prompt, *ids[:-1]]) == "a" + 5 * "\ufffd"  # what the decoder gives
    assert completion_text(tokenizer, [*prompt, *ids[:2]], ids[2:]) == "你好"
    assert completion_text(tokenizer, [*prompt, *ids[:4]], ids[4:]) == "好"
    assert token_text(tokenizer, ids[0]) == "\ufffd"


@pytest.mark.parametrize("kind", ["bytes", *KINDS])
def test_every_published_solution_comes_back_behind_its_prompt(kind, tmp_path):
    tokenizer = save_tokenizer(tmp_path) if kind == "bytes" else sentencepiece(kind)
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


STOPS = StopStrings(("\ndef", "</s>", "ef g", "€"))


@given(text=st.text(st.sampled_from("\ndefg x</s>€é"), max_size=30), place=st.integers(0, 5))
def test_a_search_ends_at_the_first_token_with_which_the_text_holds_a_stop(tokenizer, text, place):
    ids = encoded(tokenizer, text)
    prompt, rest = ids[:place], ids[place:]
    search = StopSearch(tokenizer, prompt, STOPS)
    found = next((i for i, token_id in enumerate(rest) if search.add(token_id)), None)
    texts = [completion_text(tokenizer, prompt, rest[: i + 1]) for i in range(len(rest))]
    whole = [not one.endswith("\ufffd") for one in texts]
    expected = (i for i, one in enumerate(texts) if whole[i] and STOPS.find(one))
    assert found == next(expected, None)


def test_the_stop_string_that_ends_first_is_the_one():
    stops = StopStrings(("bcd", "c", "bc"))
    assert stops.find("abcd") == (2, 3, "c")
    assert StopStrings(("bc", "c")).find("abcd") == (1, 3, "bc")
    assert stops.find("xyz") is None
    assert StopStrings(("a",)).find("aba", 1) == (2, 3, "a")


def test_text_is_cut_before_the_first_stop_string():
    assert StopStrings(("\ndef", "\nif")).cut("a\nif b\ndef c") == ("a", True)
    assert StopStrings(("\ndef",)).cut("a\n") == ("a\n", False)
    assert StopStrings(()).cut("a") == ("a", False)


@pytest.mark.parametrize(
    "text",
    [
        "a  b\n\tc",
        " leading",
        "你好 🙂\r\n",
        "e\u0301 in two code points",
        "see <s> and </s> in HTML",
    ],
)
def test_text_that_comes_back_is_let_through(tokenizer, text):
    check_round_trip(tokenizer, [("row 1", text)])


def test_text_that_is_lost_is_refused_with_its_row_and_what_came_back():
    class Blind:
        """Loses spaces."""

        def __call__(self, text, **options):
            return {"input_ids": [ord(char) for char in text if char != " "]}

        def get_vocab(self):
            return {}

        def decode(self, ids, **options):
            return "".join(map(chr, ids))

    rows = [("row 1", "fine"), ("row 2", "def f(x)")]
    told = r"row 2: the tokenizer loses text: 'def f(x)' comes back as 'deff(x)' (character 4)"
    with pytest.raises(DatasetError, match=re.escape(told)):
        check_round_trip(Blind(), rows)
    assert round_trip_change(Blind(), "a b") == "ab"
    assert round_trip_change(Blind(), "ab") is None

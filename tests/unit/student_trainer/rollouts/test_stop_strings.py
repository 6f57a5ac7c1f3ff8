"""Completions end at stop strings, wherever tokens begin and end; the text is as if cut after."""

from functools import partial

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from shared.text import StopSearch, StopStrings, completion_text
from student_trainer.rollouts import RolloutRequest, TransformersRollouts
from tests.support.models import save_model, save_tokenizer

PROMPTS = ["def f(x):", "a", "return x + 1\n\n"]


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_tokenizer(folder)
    torch.manual_seed(0)
    save_model(folder, hidden_size=16)
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def write(parts, stops):
    """Texts by prompt, numbers of tokens, and whether the length limit ended them."""
    model, tokenizer = parts
    engine = TransformersRollouts(
        model, stop_ids=[tokenizer.eos_token_id], pad_token_id=0, max_new_tokens=60,
        temperature=1.0, batch_size=2, vocab_size=len(tokenizer),
        stop_strings=partial(StopSearch, tokenizer, stops=StopStrings(stops)) if stops else None,
    )  # fmt: skip
    requests = [
        RolloutRequest(np.asarray(tokenizer(text)["input_ids"], np.uint32), ("t", number))
        for number, text in enumerate(PROMPTS)
    ]
    found = dict(item for group in engine.generate(requests) for item in group)
    return [
        (
            completion_text(tokenizer, requests[i].prompt_ids, found[i].token_ids),
            len(found[i].token_ids),
            found[i].truncated,
        )
        for i in range(len(PROMPTS))
    ]


def test_stopping_early_gives_what_cutting_afterwards_gives(parts):
    whole = write(parts, ())
    # Strings of three characters from the middle of each text: they begin and end within tokens.
    stops = tuple(text[len(text) // 2 :][:3] for text, _, _ in whole)
    assert all(stops)
    early = write(parts, stops)
    for (text, length, _), (short, steps, truncated) in zip(whole, early, strict=True):
        assert StopStrings(stops).cut(short) == StopStrings(stops).cut(text)
        assert StopStrings(stops).cut(text)[1]
        assert steps < length
        assert not truncated


def test_a_row_that_stops_leaves_the_others_alone(parts):
    whole = write(parts, ())
    stop = whole[0][0][10:18]
    assert sum(stop in text for text, _, _ in whole) == 1
    early = write(parts, (stop,))
    assert early[0][1] < whole[0][1]
    assert early[1:] == whole[1:]

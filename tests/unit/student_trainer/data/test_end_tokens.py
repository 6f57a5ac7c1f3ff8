"""Which tokens end completions: the student's, the teacher's, and those of plain text."""

import pytest
from transformers import GenerationConfig

from shared.identity import tokenizer_identity
from student_trainer.config.arguments import DataArguments
from student_trainer.data.end_tokens import compare_ends, stop_token_ids, text_end_id
from student_trainer.data.examples import RowTokenizer
from tests.support.stub import info


@pytest.mark.parametrize(
    ("own", "end"), [(None, None), (1, None), ([7, 1], None), (5, 5), ([7, 5], 7)]
)
def test_plain_text_ends_as_the_models_own_texts_do(tokenizer, own, end):
    assert tokenizer.eos_token_id == 1
    assert text_end_id(tokenizer, GenerationConfig(eos_token_id=own)) == end


def test_the_end_of_plain_text_is_appended_and_no_turns_end(tokenizer):
    config = GenerationConfig(eos_token_id=5)
    stop_ids = tuple(stop_token_ids(tokenizer, config))
    assert stop_ids == (1, 5)
    tokenize = RowTokenizer(
        tokenizer, stop_ids, DataArguments(), 200, text_end=text_end_id(tokenizer, config)
    )
    plain = tokenize(0, "row", {"prompt": "say", "completion": "it"})[0]
    assert plain.sample.token_ids[-1] == 5
    talk = [{"role": "user", "content": "say"}, {"role": "assistant", "content": "it"}]
    assert tokenize(0, "row", {"messages": talk})[0].sample.token_ids[-1] == 1


def teacher(tokenizer, *ends, main=None):
    identity = tokenizer_identity(tokenizer)
    special = {**identity.special_token_ids, **({} if main is None else {"eos_token": main})}
    identity = identity.model_copy(update={"special_token_ids": special})
    return info(tokenizer=identity, vocab_size=260, eos_token_ids=list(ends))


def test_a_teacher_that_ends_with_another_token_is_told_with_what_to_pass(tokenizer):
    end = tokenizer.convert_ids_to_tokens(3)
    told = compare_ends(tokenizer, [1, 2], teacher(tokenizer, 3, main=3))
    assert f"ends its completions with {end!r}" in told
    assert f"Pass --eos_token '{end}'" in told


@pytest.mark.parametrize("ends", [[1], [3, 1]])
def test_a_teacher_that_ends_as_the_student_does_is_no_matter(tokenizer, ends):
    assert compare_ends(tokenizer, [1, 2], teacher(tokenizer, *ends)) is None

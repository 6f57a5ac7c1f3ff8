"""The comparison of teacher and student before the first step."""

import logging
import types

import numpy as np
import pytest

from shared.errors import ConfigurationError, DatasetError, TokenizerMismatchError
from shared.identity import tokenizer_identity
from shared.protocol import Capabilities, Limits
from shared.tokenizer_file import PROBES
from student_trainer.config.arguments import ModelArguments, TeacherArguments
from student_trainer.config.training_arguments import DistillArguments
from student_trainer.data.sample import Example, Sample
from student_trainer.data.stream import ExampleStream, RowStream
from student_trainer.losses import Divergence
from student_trainer.pipeline.method import DistillationConfig
from student_trainer.teacher.compatible import check_capabilities, check_vocabulary
from student_trainer.teacher.named import Teachers
from student_trainer.training.recipe import (
    longest_rollout,
)
from student_trainer.training.teachers import check_teacher_prompts, open_teachers
from tests.support.stub import info


def teacher_of(tokenizer, vocab_size=260, **changes):
    identity = tokenizer_identity(tokenizer).model_copy(update=changes)
    return info(tokenizer=identity, vocab_size=vocab_size)


def test_log_probs_travel_as_float16_unless_told_otherwise():
    for flags, dtype in (({}, "float16"), ({"teacher_logprob_dtype": "float32"}, "float32")):
        teacher = TeacherArguments(["http://host:8000"], **flags)
        with open_teachers(teacher, ModelArguments("student")) as teachers:
            assert teachers.of(None).logprob_dtype == dtype


@pytest.mark.parametrize(("student", "teacher"), [(260, 260), (272, 260), (260, 272), (264, 288)])
def test_padded_output_layers_are_accepted(tokenizer, student, teacher):
    check_vocabulary(tokenizer, student, teacher_of(tokenizer, teacher))


def test_different_vocabularies_are_refused_with_both_fingerprints(tokenizer):
    other = teacher_of(tokenizer, fingerprint="f" * 64)
    with pytest.raises(TokenizerMismatchError) as caught:
        check_vocabulary(tokenizer, 260, other)
    assert "f" * 64 in str(caught.value)
    assert tokenizer_identity(tokenizer).fingerprint in str(caught.value)


def test_tokens_without_a_row_are_a_warning_with_their_number_and_the_first(tokenizer, caplog):
    with caplog.at_level(logging.WARNING):
        check_vocabulary(tokenizer, 250, teacher_of(tokenizer))
    (record,) = caplog.records
    assert record.message.startswith("10 of the tokenizer's tokens have no row")
    assert f"{tokenizer.convert_ids_to_tokens(250)!r} (id 250)" in record.message


def test_one_vocabulary_that_cuts_text_otherwise_is_refused_with_the_text(tokenizer):
    identity = tokenizer_identity(tokenizer)
    marks = identity.encoding.split(":")
    marks[2] = "0" * 8
    with pytest.raises(TokenizerMismatchError, match="cut text otherwise") as caught:
        check_vocabulary(tokenizer, 260, teacher_of(tokenizer, encoding=":".join(marks)))
    assert repr(PROBES[1]) in str(caught.value)


@pytest.mark.parametrize(
    ("encoding", "message"), [(None, "is older"), ("99:abc", "versions 1 and 99")]
)
def test_an_encoding_that_cannot_be_compared_is_a_warning(tokenizer, caplog, encoding, message):
    with caplog.at_level(logging.WARNING):
        check_vocabulary(tokenizer, 260, teacher_of(tokenizer, encoding=encoding))
    assert [message in record.message for record in caplog.records] == [True]


@pytest.mark.parametrize(
    ("field", "value"), [("chat_template", "{{ x }}"), ("special_token_ids", {"eos_token": 99})]
)
def test_a_difference_beside_the_vocabulary_is_a_warning_with_both_values(
    tokenizer, caplog, field, value
):
    with caplog.at_level(logging.WARNING):
        check_vocabulary(tokenizer, 260, teacher_of(tokenizer, **{field: value}))
    (record,) = caplog.records
    assert f"{field} differs" in record.message
    assert repr(value) in record.message
    assert repr(getattr(tokenizer_identity(tokenizer), field)) in record.message


def arguments(tmp_path, **options):
    return DistillArguments(output_dir=str(tmp_path), **options)


def test_what_the_teacher_cannot_do_is_refused(tmp_path):
    one = TeacherArguments(top_k_logprobs=16)
    plain = Capabilities(temperature=False, requested_token_ids=False, generate=False)
    teacher = info(limits=Limits(max_top_k=8), capabilities=plain)
    with pytest.raises(ConfigurationError, match="16 is over the teacher's limit of 8"):
        check_capabilities(teacher, arguments(tmp_path), one)
    few = TeacherArguments(top_k_logprobs=8)
    with pytest.raises(ConfigurationError, match=r"--temperature 0\.5.*\(stub\) cannot apply"):
        check_capabilities(teacher, arguments(tmp_path, temperature=0.5), few)
    with pytest.raises(ConfigurationError, match="--seq_kd: this teacher does not generate"):
        check_capabilities(teacher, arguments(tmp_path, seq_kd=True), few)
    with pytest.raises(ConfigurationError, match=r"--teacher_support sampled.*\(stub\) draws no"):
        check_capabilities(teacher, arguments(tmp_path, teacher_support="sampled"), few)
    check_capabilities(teacher, arguments(tmp_path), few)


def test_an_engine_has_room_for_what_the_student_is_asked_and_no_more():
    def example(length, checker=None):
        return Example(0, "row", np.zeros(length, np.uint32), None, checker, "text")

    method = DistillationConfig(
        1.0, False, 0.0, Divergence(), 2, max_new_tokens=8, seed=0, stop_ids=(1,)
    )
    held_out = [example(20, {"kind": "exact_match"}), example(30)]
    assert longest_rollout([example(10)], held_out, method, 99) == 28
    assert longest_rollout([example(25)], held_out, method, 99) == 33
    assert longest_rollout([example(10)], None, method, 99) == 18


class TestPromptsThatOnlyTheTeacherSees:
    """A context of 20 tokens, a teacher's prompt of 12, and completions of up to 16 if written."""

    def check(self, *, own, held_out=False, streamed=False, **method):
        ids = np.arange(5, dtype=np.uint32)
        sample = None
        if own:
            joined = np.arange(5 + own, dtype=np.uint32)
            sample = Sample(joined, 5, np.ones(own, dtype=bool), "dataset")
        seen = np.arange(12, dtype=np.uint32)
        example = Example(0, "row", ids, sample, None, "", teacher_prompt_ids=seen)
        config = DistillationConfig(**{
            "lmbda": 0.0, "seq_kd": False, "seq_kd_temperature": 1.0, "divergence": Divergence(),
            "top_k": 4, "max_new_tokens": 16, "seed": 0, "stop_ids": (1,), **method,
        })  # fmt: skip
        rows = ([], [example]) if held_out else ([example], None)
        if streamed:
            source = RowStream(["d"], [lambda: iter([("row", {})])], None, 0, 1)
            rows = ExampleStream(source, lambda *_: [example], length=9, skip=False), None
        prepared = types.SimpleNamespace(method=config, train=rows[0], held_out=rows[1])
        client = types.SimpleNamespace(info=info(max_model_len=20))
        check_teacher_prompts(Teachers({"": client}), prepared, TeacherArguments())
        return prepared.train

    @pytest.mark.parametrize(
        "row",
        [
            {"own": 8},
            {"own": 8, "held_out": True},
            {"own": 8, "held_out": True, "lmbda": 1.0},
            {"own": 8, "held_out": True, "seq_kd": True},
            {"own": 12, "lmbda": 1.0, "max_new_tokens": 8},
            {"own": 12, "seq_kd": True, "max_new_tokens": 8},
        ],
    )
    def test_what_is_scored_fits(self, row):
        self.check(**row)

    @pytest.mark.parametrize(
        ("row", "longest"),
        [
            ({"own": 9}, 9),
            ({"own": 8, "lmbda": 0.5}, 16),
            ({"own": 12, "lmbda": 0.5, "max_new_tokens": 8}, 12),
            ({"own": 0, "seq_kd": True}, 16),
            ({"own": 0, "held_out": True}, 16),
            ({"own": 9, "held_out": True, "lmbda": 1.0}, 9),
        ],
    )
    def test_what_does_not_fit_is_named(self, row, longest):
        with pytest.raises(DatasetError, match=f"row: .* 12 tokens and .* up to {longest} make"):
            self.check(**row)

    def test_a_row_of_a_stream_is_named_when_it_is_read(self):
        self.check(own=8, streamed=True)
        with pytest.raises(DatasetError, match=r"row: .* 12 tokens .* up to 9 make 21; .* is 20"):
            self.check(own=9, streamed=True)[0]

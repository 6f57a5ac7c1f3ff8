"""A checkpoint goes on with what it was begun with."""

import dataclasses
import datetime
import hashlib
import json
import logging
from typing import get_args

import pytest
from transformers import TrainingArguments

from shared.errors import ConfigurationError
from student_trainer.config.arguments import DataArguments, TeacherArguments, TemplateArguments
from student_trainer.config.commands import ARGUMENTS
from student_trainer.config.flags import Resume, flag, marked
from student_trainer.config.trainer_flags import PRIVATE, SAME, TOLD
from student_trainer.data.encode import Encoder
from student_trainer.data.examples import RowTokenizer
from student_trainer.data.template import ChatTemplate, TemplateOptions
from student_trainer.training.inputs import FILE, check_resumed, keep_inputs, training_inputs
from tests.support.stub import IDENTITY

ROW = {"prompt": "say", "completion": "it"}


@dataclasses.dataclass
class Flags:
    beta: float = flag(0.5, "", group="", resume="same")
    learning_rate: float = 1e-4
    max_steps: int = 10
    teacher_url: str = flag("http://host:1", "", group="")


def inputs(tokenizer, *, row=ROW, template="{{ messages }}", today=None, rows=8, **flags):
    tokenizer.chat_template = template
    examples = RowTokenizer(tokenizer, (1,), DataArguments(), 200)(0, "row", row)
    options = TemplateOptions({}, today or datetime.date(2026, 1, 2))
    chat = ChatTemplate(Encoder(tokenizer), options)
    return training_inputs([Flags(**flags)], examples, chat, rows_a_step=rows, teachers={})


def test_the_same_run_goes_on_without_a_word(tokenizer, tmp_path, caplog):
    keep_inputs(inputs(tokenizer), tmp_path)
    with caplog.at_level(logging.WARNING):
        check_resumed(tmp_path, inputs(tokenizer, teacher_url="http://other:2"))
    assert not caplog.records
    assert "other:2" not in (tmp_path / FILE).read_text()


DATED = "{{ strftime_now('%Y') }}{{ messages }}"


@pytest.mark.parametrize(
    ("begun", "change", "message"),
    [
        ({}, {"row": {**ROW, "completion": "that"}}, "the training rows as tokens"),
        ({}, {"row": {"prompt": "say"}}, "the training rows as tokens"),
        ({}, {"template": "{{ messages }}!"}, "the chat template"),
        ({}, {"rows": 4}, "rows a step 8 -> 4"),
        ({}, {"beta": 0.9}, "--beta 0.5 -> 0.9"),
        ({"template": DATED}, {"template": DATED, "today": datetime.date(2026, 1, 3)},
         "the date in prompts 2026-01-02 -> 2026-01-03"),
    ],
)  # fmt: skip
def test_what_neither_run_meant_is_refused(tokenizer, tmp_path, begun, change, message):
    keep_inputs(inputs(tokenizer, **begun), tmp_path)
    with pytest.raises(ConfigurationError) as caught:
        check_resumed(tmp_path, inputs(tokenizer, **change, learning_rate=1.0))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "--learning_rate 0.0001 -> 1.0" in str(caught.value)  # changed too


def test_what_may_change_is_told(tokenizer, tmp_path, caplog):
    keep_inputs(inputs(tokenizer), tmp_path)
    with caplog.at_level(logging.WARNING):
        check_resumed(tmp_path, inputs(tokenizer, max_steps=20))
    [record] = caplog.records
    assert record.message.endswith("with changes: --max_steps 10 -> 20")


def test_a_checkpoint_that_does_not_say_is_not_compared(tokenizer, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        check_resumed(tmp_path, inputs(tokenizer))
    assert "does not say what it was trained with" in caplog.text


@pytest.mark.parametrize("content", ["{", "[]", json.dumps({"same": {}})])
def test_a_damaged_file_is_named(tokenizer, tmp_path, content):
    (tmp_path / FILE).write_text(content)
    with pytest.raises(ConfigurationError, match=f"{FILE} cannot be read"):
        check_resumed(tmp_path, inputs(tokenizer))


@pytest.mark.parametrize("command", ["sft", "distill"])
def test_each_flag_of_ours_is_placed_and_those_of_transformers_exist(command):
    kinds = ARGUMENTS[command]
    theirs = {field.name for field in dataclasses.fields(TrainingArguments)}
    ours = {field.name for kind in kinds for field in dataclasses.fields(kind) if field.init}
    placed = {name for mark in get_args(Resume) for name in marked(kinds, "resume", mark)}
    assert ours - theirs <= placed
    assert {*SAME, *TOLD, *PRIVATE} <= theirs | {"logging_dir"}


def of_teachers(tokenizer, names, *, named=False, streamed=False, weights=None, prompt=None):
    tokenizer.chat_template = "{{ messages }}"
    examples = RowTokenizer(tokenizer, (1,), DataArguments(), 200)(0, "row", ROW)
    if named:
        examples = [dataclasses.replace(example, teacher="math") for example in examples]
    chat = ChatTemplate(Encoder(tokenizer), TemplateOptions())
    weights = weights or dict.fromkeys(names, "a")
    teachers = {n: IDENTITY.model_copy(update={"fingerprint": 64 * weights[n]}) for n in names}
    given = None if streamed else examples
    return training_inputs(
        [Flags()], given, chat, rows_a_step=8, teachers=teachers, teacher_template=prompt
    )


@pytest.mark.parametrize("then", ["Hint: {{ hint }}", None], ids=["changed", "new"])
@pytest.mark.parametrize("streamed", [False, True], ids=["in-memory", "stream"])
def test_a_changed_template_of_the_teachers_prompt_is_refused_with_both_hashes(
    tokenizer, tmp_path, streamed, then
):
    """Nothing else is known of a stream's rows."""
    now = "Solution: {{ hint }}"
    begun = of_teachers(tokenizer, ("",), streamed=streamed, prompt=then)
    keep_inputs(begun, tmp_path)
    check_resumed(tmp_path, begun)
    hashes = [str(text and hashlib.sha256(text.encode()).hexdigest())[:12] for text in (then, now)]
    named = f"the text of --teacher_prompt_template {hashes[0]}…? -> {hashes[1]}…"
    with pytest.raises(ConfigurationError, match=named) as caught:
        check_resumed(tmp_path, of_teachers(tokenizer, ("",), streamed=streamed, prompt=now))
    assert "--accept_teacher_change" not in str(caught.value)


@pytest.mark.parametrize(
    ("flag", "then", "now"),
    [
        ("teacher_column", "teacher", "who"),
        ("dataset_teacher", ["math", "code"], ["code", "math"]),
        ("teacher_chat_template_kwargs", None, '{"enable_thinking": false}'),
        ("chat_template_kwargs", None, '{"enable_thinking": false}'),
    ],
)
def test_a_stream_notices_which_teacher_rows_have_and_how_prompts_are_made(
    tokenizer, tmp_path, flag, then, now
):
    def given(value):
        flags = [TeacherArguments(), TemplateArguments()]
        for kind in flags:
            if hasattr(kind, flag):
                setattr(kind, flag, value)
        chat = ChatTemplate(Encoder(tokenizer), TemplateOptions())
        return training_inputs(flags, None, chat, rows_a_step=8, teachers={"": IDENTITY})

    keep_inputs(given(then), tmp_path)
    with pytest.raises(ConfigurationError) as caught:
        check_resumed(tmp_path, given(now))
    assert f"--{flag} {then} -> {now}" in str(caught.value)


@pytest.mark.parametrize("streamed", [False, True], ids=["in-memory", "stream"])
def test_rows_that_name_no_teacher_keep_the_one_they_had(tokenizer, tmp_path, streamed):
    keep_inputs(of_teachers(tokenizer, ("math", "code"), streamed=streamed), tmp_path)
    check_resumed(tmp_path, of_teachers(tokenizer, ("math", "code"), streamed=streamed))
    with pytest.raises(ConfigurationError, match="no teacher learn from math -> code") as caught:
        check_resumed(tmp_path, of_teachers(tokenizer, ("code", "math"), streamed=streamed))
    assert "--accept_teacher_change" not in str(caught.value)


def test_the_order_of_teachers_is_free_where_every_row_names_its_own(tokenizer, tmp_path):
    keep_inputs(of_teachers(tokenizer, ("math", "code"), named=True), tmp_path)
    check_resumed(tmp_path, of_teachers(tokenizer, ("code", "math"), named=True))


def test_a_teacher_that_gets_a_name_is_compared_with_the_one_that_had_none(tokenizer, tmp_path):
    keep_inputs(of_teachers(tokenizer, ("",)), tmp_path)
    check_resumed(tmp_path, of_teachers(tokenizer, ("math", "code")))
    other = of_teachers(tokenizer, ("math", "code"), weights={"math": "b", "code": "a"})
    with pytest.raises(ConfigurationError, match="the teacher's weights aaaaaaaaaaaa… -> bbbb"):
        check_resumed(tmp_path, other)


def test_a_new_teacher_is_not_to_be_accepted_where_more_has_changed(tokenizer, tmp_path):
    keep_inputs(of_teachers(tokenizer, ("math", "code")), tmp_path)
    other = of_teachers(tokenizer, ("code", "math"), weights={"math": "a", "code": "b"})
    with pytest.raises(ConfigurationError) as caught:
        check_resumed(tmp_path, other)
    assert "the teacher code's weights" in str(caught.value)
    assert "--accept_teacher_change" not in str(caught.value)

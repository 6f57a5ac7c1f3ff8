"""Rows name their teacher, and may give it a prompt that the student does not see."""

import datetime
from dataclasses import replace

import numpy as np
import pytest

from shared.errors import ConfigurationError, DatasetError
from student_trainer.config.arguments import DataArguments
from student_trainer.data.encode import Encoder
from student_trainer.data.examples import RowTokenizer
from student_trainer.data.teacher_view import TeacherView, read_template
from student_trainer.data.template import TemplateOptions

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}]
NO_VIEW = TeacherView()
ANSWER = {"role": "assistant", "content": "4"}


@pytest.fixture
def tokenize(tokenizer):
    def made(row, view=NO_VIEW, **options):
        template = TemplateOptions(today=datetime.date(2026, 1, 2))
        stop = (tokenizer.eos_token_id,)
        one = RowTokenizer(
            tokenizer, stop, DataArguments(**options), 512, template, one_sequence=True, view=view
        )
        return one(0, "row 1", row)

    return made


def test_a_column_names_the_teacher_of_a_row(tokenize):
    view = TeacherView(names=("math", "code"))
    row = {"prompt": "a", "completion": "b"}
    assert tokenize({**row, "teacher": "code"}, view)[0].teacher == "code"
    assert tokenize(row, view)[0].teacher is None
    who = replace(view, column="who")
    assert tokenize({**row, "who": "math", "teacher": "nobody"}, who)[0].teacher == "math"


def test_without_named_teachers_the_column_is_any_other(tokenize):
    row = {"prompt": "a", "completion": "b", "teacher": "gpt"}
    assert tokenize(row)[0].teacher is None


def test_an_unknown_teacher_is_an_error_that_names_row_and_teacher(tokenize):
    view = TeacherView(names=("math", "code"))
    message = "row 1: teacher 'maths': .* only math, code; did you mean math?"
    with pytest.raises(DatasetError, match=message):
        tokenize({"prompt": "a", "completion": "b", "teacher": "maths"}, view)


def test_a_text_takes_the_place_of_the_last_user_turn(tokenize, tokenizer):
    row = {"messages": [*CHAT, ANSWER], "teacher_prompt": "2 + 2? The answer is 4."}
    [example] = tokenize(row)
    [plain] = tokenize({"messages": [*CHAT, ANSWER]})
    assert (example.prompt_ids == plain.prompt_ids).all()
    assert (example.sample.token_ids == plain.sample.token_ids).all()
    seen = [CHAT[0], {"role": "user", "content": row["teacher_prompt"]}]
    [as_row] = tokenize({"messages": [*seen, ANSWER]})
    assert (example.teacher_prompt_ids == as_row.prompt_ids).all()
    ids, start = example.sequence_of_teacher(example.sample)
    assert (ids == as_row.sample.token_ids).all()
    assert start == as_row.sample.completion_start


def test_messages_are_a_whole_conversation(tokenize):
    hint = [{"role": "system", "content": "You know: 4."}, CHAT[1]]
    [example] = tokenize({"messages": [*CHAT, ANSWER], "teacher_messages": hint})
    [as_row] = tokenize({"messages": [*hint, ANSWER]})
    assert (example.teacher_prompt_ids == as_row.prompt_ids).all()


def test_plain_text_stays_plain_text(tokenize):
    [example] = tokenize({"prompt": "def f", "completion": "(x)", "teacher_prompt": "# id\ndef f"})
    [as_row] = tokenize({"prompt": "# id\ndef f", "completion": "(x)"})
    assert (example.teacher_prompt_ids == as_row.prompt_ids).all()
    assert (example.sequence_of_teacher(example.sample)[0] == as_row.sample.token_ids).all()


def test_a_template_makes_it_from_the_columns(tokenize):
    view = TeacherView(template="{{ prompt }} Hint: {{ hint|upper }}")
    [example] = tokenize({"prompt": "a", "completion": "b", "hint": "h"}, view)
    [as_row] = tokenize({"prompt": "a Hint: H", "completion": "b"})
    assert (example.teacher_prompt_ids == as_row.prompt_ids).all()


@pytest.mark.parametrize(
    ("row", "template", "message"),
    [
        ({"teacher_prompt": "x"}, "{{ prompt }}", "both say what the teacher sees"),
        ({}, "{{ hint }}", "'hint' is undefined; the row's columns are prompt, completion"),
        ({}, "{{ prompt.__class__.mro() }}", "row 1: --teacher_prompt_template"),
        ({"teacher_prompt": ""}, None, "must be a text that is not empty"),
        ({}, "{% if 0 %}x{% endif %}", "prints nothing for this row; .* columns are prompt, comp"),
        ({"teacher_prompt": {"a": 1}}, None, "must be a text"),
        ({"teacher_prompt": [CHAT[1]]}, None, "must be a text"),
        ({"teacher_prompt": 3}, None, "must be a text"),
        ({"teacher_messages": CHAT}, None, "in a row of messages"),
        ({"teacher_prompt": "x", "teacher_messages": CHAT}, None, "both say what"),
    ],
)
def test_a_prompt_that_cannot_be_used_is_an_error_that_names_the_row(
    tokenize, row, template, message
):
    with pytest.raises(DatasetError, match=message) as caught:
        tokenize({"prompt": "a", "completion": "b", **row}, TeacherView(template=template))
    assert str(caught.value).startswith("row 1")


def test_several_learned_turns_have_no_prompt_of_the_teachers_own(tokenize):
    turns = [*CHAT, ANSWER, {"role": "user", "content": "3 + 3?"}, {**ANSWER, "content": "6"}]
    row = {"messages": turns, "teacher_prompt": "3 + 3? It is 6."}
    with pytest.raises(DatasetError, match="teaches several turns"):
        tokenize(row, assistant_turns="all")
    [example] = tokenize(row)
    assert example.teacher_prompt_ids is not None


@pytest.mark.parametrize(
    "seen", [{"teacher_prompt": "x"}, {"teacher_messages": CHAT}], ids=["text", "messages"]
)
def test_an_answer_that_is_begun_has_no_prompt_of_the_teachers_own(tokenize, seen):
    begun = [*CHAT, {"role": "assistant", "content": "The sum"}]
    row = {"prompt": begun, "completion": [{"role": "assistant", "content": " is 4"}]}
    with pytest.raises(
        DatasetError, match="row 1: the prompt ends with the beginning of an answer"
    ):
        tokenize({**row, **seen})


def test_a_template_that_is_none_is_refused_before_rows_are_read(tmp_path):
    with pytest.raises(ConfigurationError, match="No such file"):
        read_template(tmp_path / "none.jinja")
    (tmp_path / "bad.jinja").write_text("{{ prompt }")
    with pytest.raises(ConfigurationError, match=r"bad\.jinja, line 1"):
        read_template(tmp_path / "bad.jinja")


def test_what_the_teacher_sees_is_kept_with_the_tokenized_rows(tokenize, tmp_path):
    from student_trainer.data import token_cache

    view = TeacherView(names=("math",))
    row = {"prompt": "a", "completion": "b", "teacher": "math", "teacher_prompt": "c"}
    examples = [*tokenize(row, view), *tokenize({"prompt": "a", "completion": "b"}, view)]
    token_cache.write(tmp_path / "rows.arrow", examples)
    kept = token_cache.read(tmp_path / "rows.arrow")
    assert [one.teacher for one in kept] == ["math", None]
    assert np.array_equal(kept[0].teacher_prompt_ids, examples[0].teacher_prompt_ids)
    assert kept[1].teacher_prompt_ids is None


def test_of_turns_that_the_limit_cuts_to_one_the_teacher_has_no_prompt_of_its_own(
    tokenizer, tokenize
):
    """The one that is left is the first, and the prompt would be that of the last."""
    turns = [*CHAT, ANSWER, {"role": "user", "content": "3 + 3?"}, {**ANSWER, "content": "6"}]
    row = {"messages": turns, "teacher_prompt": "3 + 3? It is 6."}
    [whole] = tokenize({"messages": turns}, assistant_turns="all")
    gap = int(np.flatnonzero(~whole.sample.completion_mask)[0])
    length = whole.sample.completion_start + gap
    cut = RowTokenizer(
        tokenizer, (tokenizer.eos_token_id,), DataArguments(assistant_turns="all"), length,
        TemplateOptions(today=datetime.date(2026, 1, 2)), one_sequence=True, view=NO_VIEW,
    )  # fmt: skip
    assert cut(0, "row 1", {"messages": turns})[0].sample.completion_mask.all()
    with pytest.raises(DatasetError, match="teaches several turns"):
        cut(0, "row 1", row)


def test_without_a_teacher_columns_about_one_are_like_any_others(tokenize):
    turns = [*CHAT, ANSWER, {"role": "user", "content": "3 + 3?"}, {**ANSWER, "content": "6"}]
    row = {"messages": turns, "teacher_prompt": "3 + 3? It is 6.", "teacher": "code"}
    [example] = tokenize(row, None, assistant_turns="all")
    [plain] = tokenize({"messages": turns}, None, assistant_turns="all")
    assert (example.teacher, example.teacher_prompt_ids) == (None, None)
    assert (example.sample.token_ids == plain.sample.token_ids).all()


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ 1 / number }}", "division by zero"),
        ("{{ '{missing}'.format() }}", "'missing'"),
        ("{{ self.prompt }}{{ number.upper() }}", "has no attribute"),
    ],
)
def test_a_template_that_fails_on_a_row_is_an_error_that_names_it(tokenize, template, message):
    row = {"prompt": "a", "completion": "b", "number": 0, "self": "x"}
    with pytest.raises(DatasetError, match=message) as caught:
        tokenize(row, TeacherView(template=template))
    assert str(caught.value).startswith("row 1: --teacher_prompt_template: ")


def test_a_template_reads_a_row_whatever_its_columns_are_called(tokenize):
    view = TeacherView(template="{{ prompt }} {{ context }}")
    row = {"prompt": "a", "completion": "b", "self": "x", "context": "c"}
    [as_row] = tokenize({"prompt": "a c", "completion": "b"})
    assert (tokenize(row, view)[0].teacher_prompt_ids == as_row.prompt_ids).all()


def test_a_prompt_of_the_teachers_own_without_tokens_is_named(tokenize, tokenizer, monkeypatch):
    encode = Encoder.encode_prompt
    drops = lambda self, text: [] if text == "\u200b" else encode(self, text)  # noqa: E731
    monkeypatch.setattr(Encoder, "encode_prompt", drops)
    row = {"prompt": "a", "completion": "b", "teacher_prompt": "\u200b"}
    with pytest.raises(DatasetError, match="row 1: the prompt that only the teacher sees has no"):
        tokenize(row)

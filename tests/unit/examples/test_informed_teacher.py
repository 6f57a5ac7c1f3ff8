"""The data of the informed teachers: what the prompts tell, what is held out, and the study."""

import json
import runpy
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from examples.informed_teacher.prepare import SETTINGS, make_dataset, prepare
from examples.informed_teacher.tasks import NUMBERS, OPERATIONS, WORDS, Task, is_held_out
from student_trainer.data.conversation import Conversation
from student_trainer.data.teacher_view import TeacherView, read_template
from student_trainer.evaluation.checkers import check_completions
from student_trainer.study.flags import check_flags
from student_trainer.study.plan import make_plan
from student_trainer.study.spec import load_study
from tests.support.flags import (
    command_lines,
    read_server,
    read_trainer,
    server_lines,
    trainer_lines,
)

SEED = 3
SMALL = replace(SETTINGS, pretrain_rows=600, solved_rows=60, prompted_rows=120, held_out_rows=50)
EXAMPLE = Path(__file__).parents[3] / "examples" / "informed_teacher"
README = EXAMPLE / "README.md"
HELD_OUT = ("new", "new_with_solution", "new_with_prompt", "old", "other_prompt")


@pytest.fixture(scope="module")
def data() -> dict[str, list[dict[str, Any]]]:
    return make_dataset(SEED, SMALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    prepare(folder, seed=SEED, settings=SMALL)
    return folder


def label(row: dict[str, Any]) -> str:
    return row["messages"][-1]["content"]


def asked(row: dict[str, Any]) -> str:
    return next(m["content"] for m in row["messages"] if m["role"] == "user")


def told(row: dict[str, Any]) -> dict[str, str]:
    """The meaning of each word by the row's glossary."""
    entries = row["messages"][0]["content"].removeprefix("words : ").split(" , ")
    return dict(entry.split() for entry in entries)


def tasks_in(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows that ask for more than the meanings of words."""
    return [row for row in rows if not asked(row).startswith("tell")]


def task_of(row: dict[str, Any]) -> Task:
    """The row's task, read from its answer, in whichever style."""
    names = tuple(word for word in label(row).split() if word in OPERATIONS)
    return Task(int(asked(row).split()[0]), names, None)


def words_of(text: str) -> list[str]:
    return [word for word in text.split() if word in WORDS]


def test_labels_and_solutions_end_with_the_right_number(data):
    rows = [row for name in data if name != "prompted" for row in tasks_in(data[name])]
    assert len(rows) > 300 + 60 + 5 * 50
    for row in rows:
        assert row["checker"]["answer"] == str(task_of(row).values[-1])
    checkers, answers = [row["checker"] for row in rows], [label(row) for row in rows]
    assert all(result.passed for result in check_completions(checkers, answers))


def test_the_operations_are_told_apart_by_their_results():
    results = {tuple(f(x) % NUMBERS for x in range(NUMBERS)) for f in OPERATIONS.values()}
    assert len(results) == len(OPERATIONS)


def test_a_solution_is_written_in_another_way_than_the_model_does(data):
    assert all(" by " in label(row) for row in data["solved"])
    assert not any(" by " in label(row) for row in data["pretrain"])


def test_no_held_out_combination_is_learned(data):
    for name in ("pretrain", "solved"):
        assert not any(is_held_out(task_of(row), SEED) for row in tasks_in(data[name]))
    for name in HELD_OUT:
        assert all(is_held_out(task_of(row), SEED) for row in data[name])
    assert not {asked(row) for row in data["prompted"]} & {asked(row) for row in data["new"]}


def test_no_held_out_task_occurs_twice(data):
    for name in ("new", "old"):
        assert len({row["task_id"] for row in data[name]}) == 50


def test_the_three_views_of_a_held_out_task_are_of_the_same_tasks(data):
    for name in ("new_with_solution", "new_with_prompt"):
        assert [row["checker"] for row in data[name]] == [row["checker"] for row in data["new"]]


def test_the_system_prompt_tells_every_word_that_is_learned_or_asked(data):
    meanings = told(data["new_with_prompt"][0])
    assert len(meanings) == SMALL.language_size
    for name in ("new", "solved", "prompted"):
        assert {word for row in data[name] for word in words_of(asked(row))} == set(meanings)
    for row in data["new"]:
        assert tuple(meanings[word] for word in words_of(asked(row))) == task_of(row).names
    assert {row["teacher_messages"][0]["content"] for row in data["prompted"]} == {
        data["new_with_prompt"][0]["messages"][0]["content"]
    }


def test_a_word_has_no_meaning_of_its_own_in_pretraining_and_under_other_prompts(data):
    meanings: dict[str, set[str]] = {}
    for row in data["pretrain"] + data["other_prompt"]:
        if row["messages"][0]["role"] == "system":
            for word, code in told(row).items():
                meanings.setdefault(word, set()).add(code)
    assert set(meanings) == set(WORDS)
    assert min(map(len, meanings.values())) > len(OPERATIONS) / 2


def test_plain_tasks_have_no_invented_word(data):
    assert not any(words_of(asked(row)) for row in data["old"])


def test_the_template_shows_the_teacher_what_it_was_pretrained_on(data):
    view = TeacherView(template=read_template(EXAMPLE / "solution.jinja"))
    for row, solved in zip(data["new"], data["new_with_solution"], strict=True):
        solution = solved["messages"][0]["content"].split(" solution : ")[1]
        user = row["messages"][0]
        labelled = {"messages": [user, {"role": "assistant", "content": solution}]}
        parsed = Conversation(prompt=[user], completion=labelled["messages"][1])
        assert view.messages_of("row", labelled, parsed) == solved["messages"][:1]


def test_the_same_seed_gives_the_same_bytes(folder, tmp_path):
    prepare(tmp_path, seed=SEED, settings=SMALL)
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    assert len(files) > 8
    assert [p for p in files if (folder / p).read_bytes() != (tmp_path / p).read_bytes()] == []


def test_the_module_is_a_command(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["prepare", "--help"])
    monkeypatch.delitem(sys.modules, "examples.informed_teacher.prepare")
    with pytest.raises(SystemExit):
        runpy.run_module("examples.informed_teacher.prepare", run_name="__main__")
    assert "--seed" in capsys.readouterr().out


def test_everything_fits(folder, data):
    tokenizer = AutoTokenizer.from_pretrained(folder / "init")
    room = load_study(EXAMPLE / "study.yaml").cells["self.0.001"].flags["max_new_tokens"]
    for rows in data.values():
        for row in rows:
            messages = row.get("teacher_messages", row["messages"])
            tokens = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
            assert len(tokens) + room <= SETTINGS.max_length
        for row in tasks_in(rows):
            assert len(tokenizer(label(row))["input_ids"]) < room


def test_all_learn_by_equal_updates_from_the_model_that_they_start_from():
    study = load_study(EXAMPLE / "study.yaml")
    check_flags(study)
    assert len(study.seeds) >= 3
    for names in (("sft.", "written.", "self."), ("prompt_written", "prompt_self")):
        cells = [cell for name, cell in study.cells.items() if name.startswith(names)]
        assert len({cell.flags["max_steps"] for cell in cells}) == 1
        assert len({cell.flags["dataset_name"] for cell in cells}) == 1
        assert {cell.flags["model_name_or_path"] for cell in cells} == {"{before}"}
        assert {name for cell in cells for name in cell.teachers.values()} <= {"before"}
    plan = make_plan(study, (0,))
    assert len(plan.jobs) == len(study.cells)


@pytest.mark.parametrize(
    "words",
    [words for words in trainer_lines(README) if words[0] != "study"],
    ids=lambda words: f"{words[0]}-{words[-1]}",
)
def test_every_command_of_the_trainer_is_accepted(words, monkeypatch):
    monkeypatch.chdir(EXAMPLE.parents[1])
    read_trainer(words)
    if "--teacher_prompt_template" in words:
        read_template(Path(words[words.index("--teacher_prompt_template") + 1]))


def test_every_command_of_the_server_is_accepted(monkeypatch):
    models = {read_server(words, monkeypatch).model for words in server_lines(README)}
    students = {
        words[words.index("--model_name_or_path") + 1]
        for words in trainer_lines(README)
        if words[0] == "distill"
    }
    assert models == students


@pytest.mark.skipif(shutil.which("jq") is None, reason="needs jq")
def test_the_rows_that_jq_makes_are_what_the_recipes_read(tmp_path):
    user = {"role": "user", "content": "What is 17 * 24?"}
    (tmp_path / "solved.jsonl").write_text(json.dumps({"messages": [user], "solution": "408"}))
    for name in ("prompts", "without"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"messages": [user], "task_id": "1"}))
    (tmp_path / "system.txt").write_text("Be polite.\n")
    lines = [shlex.join(words) for words in command_lines(README) if words[:1] == ["jq"]]
    for line in lines:
        subprocess.run(line.replace("'>'", ">"), shell=True, check=True, cwd=tmp_path)
    made = {name: json.loads((tmp_path / f"{name}.jsonl").read_text()) for name in
            ("labelled", "prompted", "with")}  # fmt: skip
    system = {"role": "system", "content": "Be polite.\n"}
    answer = {"role": "assistant", "content": "408"}
    assert made == {
        "labelled": {"messages": [user, answer]},
        "prompted": {"messages": [user], "teacher_messages": [system, user]},
        "with": {"messages": [system, user], "task_id": "1"},
    }

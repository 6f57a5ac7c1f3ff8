"""The lines of a run before it begins and after its end."""

import io
import json
import logging
import shlex
from types import SimpleNamespace

import pytest
import torch

from student_trainer.commands import run_summary
from student_trainer.commands.main import main
from student_trainer.commands.run_summary import describe_change, next_commands
from student_trainer.config.arguments import (
    AdapterArguments,
    DataArguments,
    DatasetArguments,
    GenerationArguments,
    ModelArguments,
    Recipe,
)
from student_trainer.config.checks import check_evaluate, check_merge
from student_trainer.config.parse import ARGUMENTS, parse
from tests.support.world import make_world


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def sft(world, output, **options):
    flags = {
        "model_name_or_path": world.student, "dataset_name": world.rows, "report_to": "none",
        "output_dir": output, "save_strategy": "no", "max_steps": 3, **options,
    }  # fmt: skip
    return main(["sft", *(f"--{name}={value}" for name, value in flags.items())])


def test_a_run_says_what_it_does_and_what_it_left(world, tmp_path, capsys):
    """Three steps: fewer than a window, which the last step ends all the same."""
    assert sft(world, tmp_path / "out") == 0
    bars = "it/s]", "?B/s"  # of transformers, which was imported before it was told to show none
    written = capsys.readouterr().err.replace("\r", "\n").splitlines()
    lines = [line for line in written if line and not line.endswith(bars)]
    start, (first, last, *end) = lines[:7], lines[7:]
    assert [line.split("  ")[0] for line in start] == [
        "method", "student", "data", "tokens", "steps", "memory", "output",
    ]  # fmt: skip
    assert start[0].endswith("supervised fine-tuning (SFT)")
    assert "13,008 parameters, float32; trained are all weights" in start[1]
    assert "48 rows, 0 held out; means of 10 prompt tokens, 9 of the completion" in start[2]
    assert first.startswith("step 1/3 · ")
    assert last.startswith("step 3/3 · ")
    assert "divergence" not in first
    assert end[0].startswith("Done: 3 steps in ")
    assert end[0].endswith(str(tmp_path / "out"))
    assert end[1].startswith("loss in training ")
    assert end[1].endswith("(steps 1 → 3)")
    assert end[2] == "Next:"
    report, serve = map(shlex.split, end[3:])
    assert main(report[1:]) == 0
    assert serve == ["teacher-server", "serve", str(tmp_path / "out")]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "on 24 rows drawn from the 48 of `rows.jsonl` (3 optimizer steps of 8, 0.5 ep" in card
    assert [line.split("`")[1] for line in card.splitlines() if line.startswith("| `")] == [
        "--max_steps"
    ]
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "train/loss" in entry] == [1, 3]


@pytest.mark.parametrize("options", [{}, {"bf16": True}, {"streaming": True}], ids=str)
def test_the_memory_is_that_of_the_dry_run(world, tmp_path, capsys, options):
    assert sft(world, tmp_path / "out", dry_run=True, **options) == 0
    table = capsys.readouterr().out.split("Memory of")[1].split("\n\n")[0].splitlines()[1:]
    parts = [line.strip().split(":")[0].split("  ") for line in table]
    *told, (_, *_, together) = [(name, rest[-1].strip()) for name, *rest in parts]
    assert sft(world, tmp_path / "out", **options) == 0
    line = next(a for a in capsys.readouterr().err.splitlines() if a.startswith("memory  "))
    expected = ", ".join(f"{name} {size}" for name, size in told)
    assert line.split("  ")[-1].strip() == f"{together} and activations: {expected}"
    assert "loss up to " in line


def test_a_resumed_run_tells_its_own_steps(world, tmp_path, capsys):
    assert sft(world, tmp_path / "out", max_steps=2, save_strategy="steps", save_steps=2) == 0
    capsys.readouterr()
    assert sft(world, tmp_path / "out", max_steps=5, resume_from_checkpoint="true") == 0
    assert "Done: step 5 (3 steps here) in " in capsys.readouterr().err


def test_a_narrow_terminal_gets_no_line_that_wraps(world, tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        encoding = "utf-8"

        def isatty(self):
            return True

    monkeypatch.setattr("sys.stderr", stream := Terminal())
    monkeypatch.setenv("COLUMNS", "60")
    run_summary._write_table({"student": "x" * 80, "steps": "20"})
    assert stream.getvalue() == f"student  {'x' * 50}…\nsteps    20\n"


def recipe(tmp_path, *, peft=False, eval_name=None):
    return Recipe(
        ModelArguments("m"), AdapterArguments(use_peft=peft), DatasetArguments(["rows.jsonl"]),
        DataArguments(eval_dataset_name=eval_name), GenerationArguments(max_new_tokens=40),
    )  # fmt: skip


def test_the_next_commands_are_commands(tmp_path):
    """They pass the checks of their flags; the folder's name has a space."""
    held_out = tmp_path / "held out.jsonl"
    held_out.write_text("")
    folder = tmp_path / "a run"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    checked = SimpleNamespace(held_out=[SimpleNamespace(checker={"kind": "python"})])
    given = recipe(tmp_path, peft=True, eval_name=str(held_out))
    evaluate, merge = (shlex.split(c)[2:] for c in next_commands(given, checked, str(folder)))
    model, dataset, generation, _, teacher, args = parse(
        evaluate, *ARGUMENTS["evaluate"], prog="evaluate", description=""
    )
    check_evaluate(model, dataset, generation, teacher, args)
    assert (dataset.dataset_name, generation.max_new_tokens) == ([str(held_out)], 40)
    (merged,) = parse(merge, *ARGUMENTS["merge"], prog="merge", description="")
    check_merge(merged)
    assert merged.output_dir == f"{folder}-merged"


@pytest.mark.parametrize(
    ("peft", "second"),
    [
        (False, "teacher-server serve out"),
        (True, "student-trainer merge --model_name_or_path out --output_dir out-merged"),
    ],
)
def test_rows_without_a_checker_are_not_evaluated_on(tmp_path, peft, second):
    """Nor is a suite that has nothing to do with them."""
    plain = SimpleNamespace(held_out=[SimpleNamespace(checker=None)])
    given = recipe(tmp_path, peft=peft, eval_name="rows.jsonl")
    assert next_commands(given, plain, "out") == ["student-trainer report out", second]


def test_rows_of_a_suite_are_evaluated_by_it(tmp_path):
    given = recipe(tmp_path)
    given.dataset.dataset_name = ["openai/gsm8k"]
    evaluate, report = next_commands(given, SimpleNamespace(held_out=None), "out")
    assert "evaluate --model_name_or_path out --suite gsm8k --max_new_tokens 40" in evaluate
    assert report == "student-trainer report out"


@pytest.mark.parametrize(
    ("history", "expected"),
    [
        ([("eval/divergence", 0, 0.5), ("train/divergence", 1, 9.0), ("eval/divergence", 4, 0.25)],
         "held-out divergence .5 → .25 (steps 0 → 4)"),
        ([("eval/loss", 2, 0.5), ("eval/loss", 4, 0.25)],
         "held-out loss .5 → .25 (steps 2 → 4)"),
        ([("eval/divergence", 4, 0.5), ("train/divergence", 1, 2.0), ("train/divergence", 4, 1.0)],
         "divergence in training 2 → 1 (steps 1 → 4)"),
        ([("train/loss", 1, 2.0)], "loss in training 2 (step 1)"),
        ([], ""),
    ],
)  # fmt: skip
def test_the_change_is_of_held_out_rows_where_they_were_measured_twice(history, expected):
    assert (
        describe_change([{"step": step, name: value} for name, step, value in history]) == expected
    )


@pytest.mark.parametrize(
    ("dtype", "parameters", "gpu", "mixed", "warned"),
    [
        ("float32", 2_000_000_000, True, False, True),
        ("float32", 2_000_000_000, True, True, False),
        ("float32", 2_000_000_000, False, False, False),
        ("float32", 900_000_000, True, False, False),
        ("bfloat16", 2_000_000_000, True, False, False),
    ],
)
def test_a_large_model_in_float32_on_a_gpu_is_warned_of(
    monkeypatch, caplog, dtype, parameters, gpu, mixed, warned
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    with caplog.at_level(logging.WARNING):
        run_summary.warn_of_float32(dtype, parameters, mixed=mixed)
    assert bool(caplog.records) == warned


@pytest.mark.parametrize(
    ("last", "first", "said"),
    [
        (8, 0, "8 steps"),
        (8, 5, "step 8 (3 steps here)"),
        (8, 8, "all 8 steps had been learned (more by --max_steps or --num_train_epochs)"),
    ],
)
def test_steps_of_earlier_runs_are_told_apart(last, first, said):
    assert run_summary.describe_steps(last, first) == said

"""Write tokenizer, untrained models and data of both kinds of tasks into a folder.

    python -m examples.two_experts.prepare --output_dir DIR --seed 0

The folder then holds base_init/ and student_init/, and JSONL files of rows whose column `teacher`
says which expert teaches them: "programs" (mini-HumanEval's) or "problems" (word problems).
"""

import random
from itertools import islice
from pathlib import Path

from examples.mini_humaneval import tasks as programs
from examples.mini_humaneval.folder import Row, run, write_models, write_rows
from examples.mini_humaneval.prepare import PRETRAIN_STYLES, row_of
from examples.two_experts import word_problems as problems
from examples.two_experts.settings import SETTINGS, Settings

KINDS = ("programs", "problems")


def main() -> None:
    run(prepare, __doc__)


def prepare(folder: Path, *, seed: int, settings: Settings = SETTINGS) -> None:
    """Write everything into the folder; the same seed and settings write the same bytes."""
    files = make_dataset(seed, settings)
    write_rows(folder, files)
    write_models(
        folder,
        [*files["pretrain"], *files["labelled"], *files["prompts"]],
        {"base_init": settings.teacher_shape, "student_init": settings.student_shape},
        vocabulary_size=settings.vocabulary_size,
        max_length=settings.max_length,
        seed=seed,
    )


def make_dataset(seed: int, settings: Settings = SETTINGS) -> dict[str, list[Row]]:
    """Return the rows of each file: what each expert learns from is also a file of its own.

    No task of one file occurs in another, except that `warmup` is a part of `pretrain`, and
    `labelled` is both experts' rows together.
    """
    rng = random.Random(f"two-experts-{seed}")
    kinds = {
        "programs": _program_rows(rng, seed, settings),
        "problems": _problem_rows(rng, seed, settings),
    }

    def mixed(name: str) -> list[Row]:
        rows = [row for kind in KINDS for row in kinds[kind][name]]
        rng.shuffle(rows)
        return rows

    return {
        "pretrain": mixed("pretrain"),
        "warmup": mixed("warmup"),
        **{f"labelled_{kind}": kinds[kind]["labelled"] for kind in KINDS},
        "labelled": mixed("labelled"),
        "prompts": mixed("prompts"),
        "held_out": mixed("held_out"),
    }


def _program_rows(rng: random.Random, seed: int, settings: Settings) -> dict[str, list[Row]]:
    taken: set[str] = set()

    def draw(count: int, *, held_out: bool = False) -> list[programs.Task]:
        found = programs.generate_tasks(
            rng,
            seed,
            held_out=held_out,
            single_share=0.0,
            branch_share=0.0,
            taken=taken,
        )
        return list(islice(found, count))

    held_out = draw(settings.held_out_rows, held_out=True)
    labelled, prompts = draw(settings.labelled_rows), draw(settings.prompt_rows)
    singles = round(settings.pretrain_single_share * settings.pretrain_rows)
    pretrain = [
        programs.random_task(rng, single_share=1.0, branch_share=0.0) for _ in range(singles)
    ] + draw(settings.pretrain_rows - singles)
    rng.shuffle(pretrain)
    learnt = [_named(row_of(task, rng.choice(PRETRAIN_STYLES)), "programs") for task in pretrain]
    return {
        "pretrain": learnt,
        "warmup": learnt[: settings.warmup_rows],
        "labelled": [_named(row_of(task, "target"), "programs") for task in labelled],
        "prompts": [_without_answer(_named(row_of(t, "target"), "programs")) for t in prompts],
        "held_out": [_named(row_of(task, "target"), "programs") for task in held_out],
    }


def _problem_rows(rng: random.Random, seed: int, settings: Settings) -> dict[str, list[Row]]:
    taken: set[str] = set()

    def draw(count: int, *, held_out: bool = False) -> list[problems.Problem]:
        return list(
            islice(problems.generate_problems(rng, seed, held_out=held_out, taken=taken), count)
        )

    held_out = draw(settings.held_out_rows, held_out=True)
    labelled, prompts = draw(settings.labelled_rows), draw(settings.prompt_rows)
    pretrain = draw(settings.pretrain_rows)
    styles = [style for style in problems.STYLES if style != "target"]
    learnt = [problem_row(problem, rng.choice(styles)) for problem in pretrain]
    return {
        "pretrain": learnt,
        "warmup": learnt[: settings.warmup_rows],
        "labelled": [problem_row(problem, "target") for problem in labelled],
        "prompts": [_without_answer(problem_row(problem, "target")) for problem in prompts],
        "held_out": [problem_row(problem, "target") for problem in held_out],
    }


def problem_row(problem: problems.Problem, style: problems.Style) -> Row:
    """Return a labelled row of a word problem with its checker."""
    row = {
        "messages": [
            {"role": "user", "content": problem.question(style)},
            {"role": "assistant", "content": problem.worked_answer()},
        ],
        "task_id": problem.task_id,
        "checker": {"kind": "final_number", "answer": str(problem.values()[-1])},
    }
    return _named(row, "problems")


def _named(row: Row, teacher: str) -> Row:
    return {"teacher": teacher, **row}


def _without_answer(row: Row) -> Row:
    kept = {key: value for key, value in row.items() if key != "checker"}
    return kept | {"messages": row["messages"][:1]}


if __name__ == "__main__":
    main()

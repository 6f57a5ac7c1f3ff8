"""Write tokenizer, untrained models and data of the experiment into a folder.

    python -m examples.mini_humaneval.prepare --output_dir DIR --seed 0

The folder then holds teacher_init/ and student_init/, and five JSONL files. No task of one file
occurs in another, except that the student's warm-up is a part of the teacher's pretraining.
"""

import random
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from examples.mini_humaneval.folder import Row, run, write_models, write_rows
from examples.mini_humaneval.settings import SETTINGS, Settings
from examples.mini_humaneval.tasks import (
    STYLES,
    Style,
    Task,
    checker_of,
    corrupted_body,
    generate_tasks,
    random_task,
)

PRETRAIN_STYLES = tuple(style for style in STYLES if style != "target")


@dataclass(frozen=True)
class Dataset:
    """The rows of each file; the file's name is the field's."""

    teacher_pretrain: list[Row]
    student_warmup: list[Row]
    labelled: list[Row]
    prompts: list[Row]
    held_out: list[Row]

    def files(self) -> dict[str, list[Row]]:
        return vars(self)


def main() -> None:
    run(prepare, __doc__)


def prepare(folder: Path, *, seed: int, settings: Settings = SETTINGS) -> None:
    """Write everything into the folder; the same seed and settings write the same bytes."""
    data = make_dataset(seed, settings)
    write_rows(folder, data.files())
    write_models(
        folder,
        [*data.teacher_pretrain, *data.labelled, *data.prompts],
        {"teacher_init": settings.teacher_shape, "student_init": settings.student_shape},
        vocabulary_size=settings.vocabulary_size,
        max_length=settings.max_length,
        seed=seed,
    )


def make_dataset(seed: int, settings: Settings = SETTINGS) -> Dataset:
    """Return all rows, drawn from one generator, the held-out and labelled ones first."""
    rng = random.Random(f"mini-humaneval-{seed}")
    taken: set[str] = set()

    def draw(count: int, *, held_out: bool) -> list[Task]:
        tasks = generate_tasks(
            rng,
            seed,
            held_out=held_out,
            single_share=0.0,
            branch_share=settings.branch_share,
            taken=taken,
        )
        return list(islice(tasks, count))

    held_out = draw(settings.held_out_rows, held_out=True)
    labelled = draw(settings.labelled_rows, held_out=False)
    prompts = draw(settings.prompt_rows, held_out=False)
    # There are a few hundred single steps only, so these repeat, in other words.
    singles = round(settings.pretrain_single_share * settings.pretrain_rows)
    pretrain = [random_task(rng, single_share=1.0, branch_share=0.0) for _ in range(singles)]
    pretrain += draw(settings.pretrain_rows - singles, held_out=False)
    rng.shuffle(pretrain)
    pretrain_rows = [row_of(task, rng.choice(PRETRAIN_STYLES)) for task in pretrain]

    wrong = set(rng.sample(range(len(labelled)), round(settings.noise_share * len(labelled))))
    return Dataset(
        teacher_pretrain=pretrain_rows,
        student_warmup=pretrain_rows[: settings.warmup_rows],
        labelled=[
            row_of(task, "target", corrupted_body(task, rng, seed) if i in wrong else None)
            for i, task in enumerate(labelled)
        ],
        prompts=[_prompt_row(task) for task in prompts],
        held_out=[row_of(task, "target") for task in held_out],
    )


def row_of(task: Task, style: Style, body: str | None = None) -> Row:
    """Return a labelled row with its checker; `body` replaces the reference solution as label."""
    return {
        "messages": [
            {"role": "user", "content": task.description(style)},
            {"role": "assistant", "content": task.body() if body is None else body},
        ],
        "task_id": task.task_id,
        "checker": checker_of(task),
    }


def _prompt_row(task: Task) -> Row:
    return {
        "messages": [{"role": "user", "content": task.description("target")}],
        "task_id": task.task_id,
    }


if __name__ == "__main__":
    main()

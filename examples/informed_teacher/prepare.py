"""Write tokenizer, untrained model and data of both recipes into a folder.

    python -m examples.informed_teacher.prepare --output_dir DIR --seed 0

The folder then holds init/ and the JSONL files. `solved` and `prompted` are what is learned from,
and use one language of invented words; the others but `pretrain` are held out.
"""

import argparse
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.informed_teacher.tasks import (
    KNOWN,
    Language,
    description,
    draw,
    glossary,
    invent,
    number_of_tasks,
    pairs,
    solution,
)
from examples.mini_humaneval.models import ModelShape, build_model, save, train_tokenizer
from examples.mini_humaneval.tasks import (
    ENTRY_POINT,
    FUNCTION_HEAD,
    Task,
    unit_test,
)

Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """The numbers of data and model, each with its reason."""

    # All operations, words and code are whole tokens at this size.
    vocabulary_size: int = 640
    # The longest prompt, with a glossary, has about 150 tokens.
    max_length: int = 256
    # Two layers suffice to look a word up and to copy; a third makes it quicker to learn.
    shape: ModelShape = ModelShape(128, 320, 3, 4, initializer_range=0.05)
    pretrain_rows: int = 12_000
    # Of the pretraining: tasks with a glossary, and tasks with a solution; the rest is plain.
    glossary_share: float = 0.5
    solution_share: float = 0.25
    # Of the glossaries of the pretraining.
    glossary_sizes: tuple[int, int] = (2, 10)
    # The words of the one language that is to be learnt.
    language_size: int = 10
    solved_rows: int = 300
    prompted_rows: int = 1_000
    held_out_rows: int = 200


SETTINGS = Settings()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    prepare(arguments.output_dir, seed=arguments.seed)


def prepare(folder: Path, *, seed: int, settings: Settings = SETTINGS) -> None:
    """Write everything into the folder; the same seed and settings write the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    files = make_dataset(seed, settings)
    for name, rows in files.items():
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    texts = [m["content"] for row in files["pretrain"] for m in row["messages"]]
    tokenizer = train_tokenizer(
        texts, vocabulary_size=settings.vocabulary_size, max_length=settings.max_length
    )
    model = build_model(tokenizer, settings.shape, max_length=settings.max_length, seed=seed)
    save(model, tokenizer, folder / "init")


def make_dataset(seed: int, settings: Settings = SETTINGS) -> dict[str, list[Row]]:
    """Return the rows of each file by its name."""
    rng = random.Random(f"informed-teacher-{seed}")
    language = _language(rng, seed, settings)
    told = glossary(language)
    new = _draw(rng, seed, language, settings.held_out_rows, held_out=True)
    learned = _draw(rng, seed, language, settings.prompted_rows, held_out=False)
    old = _draw(rng, seed, None, settings.held_out_rows, held_out=True)
    return {
        "pretrain": [_pretrain_row(rng, seed, settings) for _ in range(settings.pretrain_rows)],
        "solved": [row_of(task, body=solution(task)) for task in learned[: settings.solved_rows]],
        "prompted": [_prompted_row(task, told) for task in learned],
        "new": [row_of(task) for task in new],
        "new_with_solution": [row_of(task, solved=True) for task in new],
        "new_with_prompt": [row_of(task, system=told) for task in new],
        "old": [row_of(task) for task in old],
        "other_prompt": [
            _with_random_glossary(rng, seed, settings.language_size, held_out=True)
            for _ in range(settings.held_out_rows)
        ],
    }


def _language(rng: random.Random, seed: int, settings: Settings) -> Language:
    """Return a language with enough tasks on both sides of the split."""
    while True:
        language = invent(rng, settings.language_size)
        if (
            number_of_tasks(pairs(seed, language, held_out=True)) >= 2 * settings.held_out_rows
            and number_of_tasks(pairs(seed, language, held_out=False)) >= 2 * settings.prompted_rows
        ):
            return language


def _draw(
    rng: random.Random, seed: int, language: Language | None, count: int, *, held_out: bool
) -> list[Task]:
    """Return so many tasks of one side of the split, none of them twice."""
    possible = pairs(seed, language, held_out=held_out)
    found: dict[str, Task] = {}
    while len(found) < count:
        task = draw(rng, possible, language)
        found[task.task_id] = task
    return list(found.values())


def _pretrain_row(rng: random.Random, seed: int, settings: Settings) -> Row:
    share = rng.random()
    if share < settings.glossary_share:
        size = rng.randint(*settings.glossary_sizes)
        return _with_random_glossary(rng, seed, size, held_out=False)
    if share < settings.glossary_share + settings.solution_share:
        language = invent(rng, len(KNOWN)) if rng.random() < 0.5 else None
        return row_of(draw(rng, pairs(seed, language, held_out=False), language), solved=True)
    return row_of(draw(rng, pairs(seed, None, held_out=False), None))


def _with_random_glossary(rng: random.Random, seed: int, size: int, *, held_out: bool) -> Row:
    while True:
        language = invent(rng, size)
        if known := pairs(seed, language, held_out=held_out):
            return row_of(draw(rng, known, language), system=glossary(language))


def _prompted_row(task: Task, told: str) -> Row:
    """Return a row whose system prompt only the teacher sees."""
    user = {"role": "user", "content": description(task)}
    return {
        "messages": [user],
        "teacher_messages": [{"role": "system", "content": told}, user],
        "task_id": task.task_id,
    }


def row_of(
    task: Task, *, body: str | None = None, system: str | None = None, solved: bool = False
) -> Row:
    """Return a labelled row with its checker.

    Args:
        body: the label; by default the body as the model of the pretraining writes it.
        system: what stands before the task.
        solved: the prompt has a solution, as the informed teacher sees it.
    """
    user = description(task)
    if solved:
        user = f"{user} A solution:\n{solution(task)}"  # as solution.jinja
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": user})
    messages.append({"role": "assistant", "content": task.body() if body is None else body})
    return {
        "messages": messages,
        "task_id": task.task_id,
        "checker": {
            "kind": "python",
            "prompt": FUNCTION_HEAD,
            "entry_point": ENTRY_POINT,
            "test": unit_test(task),
        },
    }


if __name__ == "__main__":
    main()

"""Write tokenizer, untrained model and data of both recipes into a folder.

    python -m examples.informed_teacher.prepare --output_dir DIR --seed 0

The folder then holds init/ and the JSONL files. `solved` and `prompted` are what is learned from,
and use one language of invented words; the others but `pretrain` are held out.
"""

import random
from dataclasses import dataclass
from pathlib import Path

from examples.informed_teacher.tasks import (
    OPERATIONS,
    Language,
    Task,
    draw,
    glossary,
    invent,
)
from examples.mini_humaneval.folder import Row, run, write_models, write_rows
from examples.mini_humaneval.models import ModelShape


@dataclass(frozen=True)
class Settings:
    """The numbers of data and model, each with its reason."""

    # All words and numbers are whole tokens at this size.
    vocabulary_size: int = 512
    # The longest conversation, with a glossary, has about 50 tokens.
    max_length: int = 96
    # Two layers suffice to look a word up in the prompt.
    shape: ModelShape = ModelShape(128, 320, 2, 4, initializer_range=0.05)
    pretrain_rows: int = 16_000
    # Of the pretraining: glossaries to be told in another order, which is where looking up is
    # learnt, tasks with a glossary, and tasks with a solution; the rest is plain.
    telling_share: float = 0.35
    glossary_share: float = 0.25
    solution_share: float = 0.2
    # Of the glossaries of the pretraining. Of fewer than four words all tasks may be held out.
    glossary_sizes: tuple[int, int] = (4, 8)
    # The words of the one language that is to be learnt.
    language_size: int = 8
    solved_rows: int = 300
    prompted_rows: int = 1_000
    # One standard error is at most .03 at this size.
    held_out_rows: int = 300


SETTINGS = Settings()


def main() -> None:
    run(prepare, __doc__)


def prepare(folder: Path, *, seed: int, settings: Settings = SETTINGS) -> None:
    """Write everything into the folder; the same seed and settings write the same bytes."""
    files = make_dataset(seed, settings)
    write_rows(folder, files)
    write_models(
        folder,
        files["pretrain"],
        {"init": settings.shape},
        vocabulary_size=settings.vocabulary_size,
        max_length=settings.max_length,
        seed=seed,
    )


def make_dataset(seed: int, settings: Settings = SETTINGS) -> dict[str, list[Row]]:
    """Return the rows of each file by its name."""
    rng = random.Random(f"informed-teacher-{seed}")
    language = invent(rng, settings.language_size)
    told = glossary(language)
    held_out, solved = settings.held_out_rows, settings.solved_rows
    new = _draw(rng, seed, language, held_out, held_out=True)
    learned = _draw(rng, seed, language, settings.prompted_rows, held_out=False)
    old = _draw(rng, seed, None, held_out, held_out=True)
    return {
        "pretrain": [_pretrain_row(rng, seed, settings) for _ in range(settings.pretrain_rows)],
        "solved": [row_of(task, answer=task.solution()) for task in learned[:solved]],
        "prompted": [_prompted_row(task, told) for task in learned],
        "new": [row_of(task) for task in new],
        "new_with_solution": [row_of(task, solved=True) for task in new],
        "new_with_prompt": [row_of(task, system=told) for task in new],
        "old": [row_of(task) for task in old],
        "other_prompt": [
            _with_random_glossary(rng, seed, settings.language_size, held_out=True)
            for _ in range(held_out)
        ],
    }


def _draw(
    rng: random.Random, seed: int, language: Language | None, count: int, *, held_out: bool
) -> list[Task]:
    """Return so many tasks of one side of the split, none of them twice."""
    found: dict[str, Task] = {}
    while len(found) < count:
        task = draw(rng, seed, language, held_out=held_out)
        found[task.description()] = task
    return list(found.values())


def _pretrain_row(rng: random.Random, seed: int, settings: Settings) -> Row:
    telling, glossaries = settings.telling_share, settings.glossary_share
    share, size = rng.random(), rng.randint(*settings.glossary_sizes)
    if share < telling:
        return _telling_row(rng, size)
    if share < telling + glossaries:
        return _with_random_glossary(rng, seed, size, held_out=False)
    if share < telling + glossaries + settings.solution_share:
        language = invent(rng, len(OPERATIONS)) if rng.random() < 0.5 else None
        return row_of(draw(rng, seed, language, held_out=False), solved=True)
    return row_of(draw(rng, seed, None, held_out=False))


def _telling_row(rng: random.Random, size: int) -> Row:
    """Return a row that asks for the meanings of all words of a glossary."""
    language = invent(rng, size)
    told = rng.sample(list(language.items()), size)
    return {
        "messages": [
            {"role": "system", "content": glossary(language)},
            {"role": "user", "content": "tell " + " ".join(word for _, word in told)},
            {"role": "assistant", "content": "they : " + " ".join(f"{w} {n}" for n, w in told)},
        ]
    }


def _with_random_glossary(rng: random.Random, seed: int, size: int, *, held_out: bool) -> Row:
    language = invent(rng, size)
    return row_of(draw(rng, seed, language, held_out=held_out), system=glossary(language))


def _prompted_row(task: Task, told: str) -> Row:
    """Return a row whose system prompt only the teacher sees."""
    user = {"role": "user", "content": task.description()}
    return {
        "messages": [user],
        "teacher_messages": [{"role": "system", "content": told}, user],
        "task_id": task.description(),
    }


def row_of(
    task: Task, *, answer: str | None = None, system: str | None = None, solved: bool = False
) -> Row:
    """Return a labelled row with its checker.

    Args:
        answer: the label; by default the answer as the model of the pretraining writes it.
        system: what stands before the task.
        solved: the prompt has a solution, as the informed teacher sees it.
    """
    user = task.description()
    if solved:
        user = f"{user} solution : {task.solution()}"  # as solution.jinja
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": user})
    messages.append({"role": "assistant", "content": task.answer() if answer is None else answer})
    return {
        "messages": messages,
        "task_id": task.description(),
        "checker": {"kind": "final_number", "answer": str(task.values[-1])},
    }


if __name__ == "__main__":
    main()

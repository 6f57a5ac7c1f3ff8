"""Tasks on small numbers in plain or invented words, and the texts that tell what the words mean.

A task is a number and three words: `7 up double flip`. Plain words name operations that are learnt
in pretraining. An invented word (`zibo`) means another operation in every row, so it can only be
understood from the prompt: from a *glossary*, or from a *solution* of the very task, which another
hand has written in another way than the model does.
"""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

NUMBERS = 20  # one token each; results are taken modulo it
STEPS = 3
HELD_OUT_EVERY = 4  # one sum of operations in four is never trained on

OPERATIONS: Mapping[str, Callable[[int], int]] = {
    "up": lambda x: x + 1,
    "down": lambda x: x - 1,
    "hop": lambda x: x + 3,
    "back": lambda x: x - 4,
    "skip": lambda x: x + 7,
    "far": lambda x: x + 10,
    "double": lambda x: 2 * x,
    "triple": lambda x: 3 * x,
    "half": lambda x: x // 2,
    "flip": lambda x: -x,
    "square": lambda x: x * x,
    "mirror": lambda x: NUMBERS // 2 - x,
}
WORDS = tuple(
    first + last for first in ("zi", "wu", "ke", "pla") for last in ("bo", "gan", "lem", "xi")
)
"""The invented words; which one means what is drawn anew for every row of the pretraining."""

Language = Mapping[str, str]
"""Operation's name -> the invented word for it."""
_INDEX = {name: index for index, name in enumerate(OPERATIONS)}


@dataclass(frozen=True)
class Task:
    """A number and the names of the operations on it, with the words for them (or plain ones)."""

    start: int
    names: tuple[str, ...]
    language: Language | None

    @property
    def words(self) -> list[str]:
        return [name if self.language is None else self.language[name] for name in self.names]

    @property
    def values(self) -> list[int]:
        """The number after each step."""
        found, value = [], self.start
        for name in self.names:
            value = OPERATIONS[name](value) % NUMBERS
            found.append(value)
        return found

    def description(self) -> str:
        """Return the task as it is asked."""
        return " ".join([str(self.start), *self.words])

    def answer(self) -> str:
        """Return the answer as the model writes it: the start, and then word, meaning, result.

        A plain word is its own meaning, and is not repeated.
        """
        parts = [str(self.start)]
        for word, name, value in zip(self.words, self.names, self.values, strict=True):
            parts += [word, name] if word != name else [name]
            parts.append(str(value))
        return " ".join(parts)

    def solution(self) -> str:
        """Return the answer as another hand writes it: results first, and then their reasons."""
        steps = zip(self.values, self.names, strict=True)
        return " , ".join(f"{value} by {name}" for value, name in steps)


def invent(rng: random.Random, count: int) -> Language:
    """Return invented words for `count` operations."""
    names = rng.sample(list(OPERATIONS), count)
    return dict(zip(names, rng.sample(WORDS, count), strict=True))


def glossary(language: Language) -> str:
    """Return the meaning of each word."""
    entries = sorted(f"{word} {name}" for name, word in language.items())
    return "words : " + " , ".join(entries)


def is_held_out(task: Task, seed: int) -> bool:
    """Return whether tasks with these operations, in any order, are kept for evaluation."""
    return (sum(_INDEX[name] for name in task.names) + seed) % HELD_OUT_EVERY == 0


def draw(rng: random.Random, seed: int, language: Language | None, *, held_out: bool) -> Task:
    """Return a task from one side of the split, in plain words or in those of a language."""
    known = list(OPERATIONS if language is None else language)
    while True:
        names = tuple(rng.choice(known) for _ in range(STEPS))
        task = Task(rng.randrange(NUMBERS), names, language)
        if is_held_out(task, seed) == held_out:
            return task

"""Tasks that are put in invented words, and the texts that tell what the words mean.

A *word* names an operation of mini-HumanEval. Plain words ("increase it by 3") are learnt in
pretraining. Invented ones ("zibo 3") mean something else in every row, so they can only be
understood from the prompt: from a *glossary*, or from a *solution* of the very task, which another
hand has written in another way than the model does.
"""

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from itertools import pairwise

from examples.mini_humaneval.tasks import OPERATIONS, Operation, Step, Task, is_held_out

# Strings are left out: their letters are the only constants that are not digits.
KNOWN = tuple(operation for operation in OPERATIONS if operation.takes != "string")
WORDS = tuple(
    first + last
    for first in ("zi", "wu", "da", "ke", "mo", "pla", "ru", "ti")
    for last in ("bo", "gan", "lem", "xi")
)
"""The invented words; which one means what is drawn anew for every row of the pretraining."""
_VALUE = re.compile(r"\bx\b")

Language = Mapping[str, str]
"""Operation's name -> the invented word for it."""
Pair = tuple[Operation, Operation]


def invent(rng: random.Random, count: int) -> Language:
    """Return invented words for `count` operations."""
    operations = rng.sample(KNOWN, count)
    words = rng.sample(WORDS, count)
    return {operation.name: word for operation, word in zip(operations, words, strict=True)}


def glossary(language: Language) -> str:
    """Return the meaning of each word; `N` stands for the number behind a word."""
    meanings = {
        _called(operation, language).spoken.format(k="N"): operation.code.format(k="N")
        for operation in KNOWN
        if operation.name in language
    }
    entries = (f"{words}: {meanings[words]}" for words in sorted(meanings))
    return "Words: " + " ; ".join(entries)  # a space before each, as in a task, is the same token


def pairs(seed: int, language: Language | None, *, held_out: bool) -> list[Pair]:
    """Return the operations of one side of the split that can follow each other.

    They are all that are known, or those that a language has words for.
    """
    return [
        pair
        for pair in _all_pairs(seed, held_out)
        if language is None or all(operation.name in language for operation in pair)
    ]


@cache
def _all_pairs(seed: int, held_out: bool) -> list[Pair]:
    return [
        (first, second)
        for first in KNOWN
        for second in KNOWN
        if first.gives == second.takes
        and is_held_out(frozenset((first.name, second.name)), seed) == held_out
    ]


def number_of_tasks(pairs: Sequence[Pair]) -> int:
    """Return how many tasks there are with these pairs and all constants."""
    return sum(len(first.constants) * len(second.constants) for first, second in pairs)


def draw(rng: random.Random, pairs: Sequence[Pair], language: Language | None) -> Task:
    """Return one of the pairs as a task, in plain words or in those of a language."""
    pair = rng.choice(pairs)
    steps = tuple(Step(_called(o, language), rng.choice(o.constants)) for o in pair)
    return Task(pair[0].takes, steps)


def description(task: Task) -> str:
    """Return the task as it is asked."""
    return task.description("spoken")


def solution(task: Task) -> str:
    """Return a right body by another hand: every step has a variable of its own."""
    names = "xab"
    lines = [
        f"    {after} = {re.sub(_VALUE, before, step.code)}\n"
        for step, (before, after) in zip(task.steps, pairwise(names), strict=True)
    ]
    return "".join(lines) + f"    return {names[-1]}"


def _called(operation: Operation, language: Language | None) -> Operation:
    if language is None:
        return operation
    constant = "" if operation.constants == ("",) else " {k}"
    return replace(operation, spoken=language[operation.name] + constant)

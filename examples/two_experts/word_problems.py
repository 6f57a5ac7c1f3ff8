"""Word problems of two steps over small numbers, with worked answers and a final number.

A *problem* starts with some things, and two steps change how many there are. Its *path* is the
start with both steps, whoever has the things and whatever they are. One path in eight is held out:
each single calculation of a held-out problem may be seen in training, but never the whole path.

Everything follows from `seed` alone, on every machine.
"""

import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

Style = Literal["terse", "spoken", "target"]
STYLES: tuple[Style, ...] = get_args(Style)
HELD_OUT_EVERY = 8  # one path in eight is never trained on
LARGEST = 24  # no number on the way is larger: there are a few hundred calculations to know

NAMES = ("Ann", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Ida")
THINGS = ("apples", "books", "coins", "pears", "shells", "stamps")


@dataclass(frozen=True)
class Operation:
    """An operation of one step with its wordings; `{k}` is the number beside it."""

    sign: str
    terse: str
    spoken: str
    target: str
    numbers: tuple[int, ...]

    def result(self, value: int, number: int) -> int | None:
        """Return what is left, or None where it is no whole number from 1 to `LARGEST`."""
        if self.sign == "/" and value % number:
            return None
        found = {"+": value + number, "-": value - number, "*": value * number}.get(
            self.sign, value // number
        )
        return found if 1 <= found <= LARGEST else None


OPERATIONS = (
    Operation("+", "plus {k}", "{k} more come", "is given {k} more", (2, 3, 4, 5, 6)),
    Operation("-", "minus {k}", "{k} go", "loses {k} of them", (2, 3, 4, 5, 6)),
    Operation("*", "times {k}", "there are {k} times as many", "swaps each for {k}", (2, 3)),
    Operation("/", "over {k}", "one in {k} stays", "keeps one of every {k}", (2, 3)),
)


@dataclass(frozen=True)
class Step:
    """An operation with its number."""

    operation: Operation
    number: int

    def words(self, style: Style) -> str:
        return str(getattr(self.operation, style)).format(k=self.number)


@dataclass(frozen=True)
class Problem:
    """A problem of a start and two steps."""

    name: str
    thing: str
    start: int
    steps: tuple[Step, Step]

    @property
    def path(self) -> str:
        return f"{self.start}" + "".join(f"{s.operation.sign}{s.number}" for s in self.steps)

    @property
    def task_id(self) -> str:
        return f"{self.path}:{self.name}:{self.thing}"

    def values(self) -> list[int]:
        """Return the start and the number after each step."""
        values = [self.start]
        for step in self.steps:
            found = step.operation.result(values[-1], step.number)
            assert found is not None  # `random_problem` yields no others
            values.append(found)
        return values

    def question(self, style: Style) -> str:
        """Return the problem in words: "target" as users write, other styles for pretraining."""
        first, second = (step.words(style) for step in self.steps)
        return {
            "terse": f"{self.thing}: {self.start}, {first}, {second}",
            "spoken": f"There are {self.start} {self.thing}. First {first}, then {second}.",
            "target": f"{self.name} has {self.start} {self.thing}, {first} and {second}. How many "
            f"{self.thing} has {self.name} now?",
        }[style]

    def worked_answer(self) -> str:
        """Return the calculation, a step a line, and the final number behind `####`."""
        values = self.values()
        lines = [
            f" {before} {step.operation.sign} {step.number} = {after}\n"
            for before, step, after in zip(values, self.steps, values[1:], strict=False)
        ]
        return "".join(lines) + f"#### {values[-1]}"


def is_held_out(problem: Problem, seed: int) -> bool:
    """Return whether problems of this path are kept for evaluation."""
    return zlib.crc32(f"{seed} {problem.path}".encode()) % HELD_OUT_EVERY == 0


def random_problem(rng: random.Random) -> Problem:
    """Return a random problem, all of whose numbers are whole and from 1 to `LARGEST`."""
    while True:
        value = start = rng.randint(3, 12)
        steps = []
        for _ in range(2):
            operation = rng.choice(OPERATIONS)
            step = Step(operation, rng.choice(operation.numbers))
            found = operation.result(value, step.number)
            if found is None:
                break
            value = found
            steps.append(step)
        if len(steps) == 2:
            return Problem(rng.choice(NAMES), rng.choice(THINGS), start, (steps[0], steps[1]))


def generate_problems(
    rng: random.Random, seed: int, *, held_out: bool, taken: set[str]
) -> Iterator[Problem]:
    """Yield problems from one side of the split without end, each at most once.

    `taken` grows with their ids, so that two calls that share it never yield the same problem.
    """
    while True:
        problem = random_problem(rng)
        if is_held_out(problem, seed) != held_out or problem.task_id in taken:
            continue
        taken.add(problem.task_id)
        yield problem

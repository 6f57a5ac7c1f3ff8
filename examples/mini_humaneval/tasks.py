"""The tasks of mini-HumanEval: a description, the body of a Python function, and its unit tests.

A *task* is one or two steps over a number, a list or a string, run one after the other or chosen
between by a condition. A *composition* is the pair of operations that meet in a task, whatever
their order, their constants and the condition. One composition in eight is held out: each
operation of a held-out task has been seen in training, but never beside its partner.

Everything follows from `seed` alone, on every machine.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal, get_args

Kind = Literal["number", "list", "string"]
Style = Literal["terse", "spoken", "note", "target"]
STYLES: tuple[Style, ...] = get_args(Style)

FUNCTION_HEAD = "def f(x):\n"
ENTRY_POINT = "f"
HELD_OUT_EVERY = 8  # one composition in eight is never trained on

DIGITS = tuple("23456789")
LETTERS = tuple("abcdeopr")
NO_CONSTANT = ("",)


@dataclass(frozen=True)
class Operation:
    """An operation of one step: an expression over `x` and its wordings; `{k}` is the constant."""

    name: str
    takes: Kind
    gives: Kind
    code: str
    terse: str
    spoken: str
    target: str = ""  # as spoken, where empty
    constants: tuple[str, ...] = NO_CONSTANT


@dataclass(frozen=True)
class Condition:
    """A test on `x` that picks one of two steps; fields as in `Operation`."""

    name: str
    takes: Kind
    code: str
    terse: str
    spoken: str
    target: str = ""
    constants: tuple[str, ...] = DIGITS


# fmt: off
OPERATIONS = (
    Operation("add", "number", "number", "x + {k}",
              "add {k}", "increase it by {k}", constants=DIGITS),
    Operation("subtract", "number", "number", "x - {k}",
              "subtract {k}", "decrease it by {k}", constants=DIGITS),
    Operation("multiply", "number", "number", "x * {k}",
              "multiply by {k}", "scale it by {k}", constants=DIGITS),
    Operation("divide", "number", "number", "x // {k}",
              "divide by {k}", "split it into {k}", target="share it among {k}", constants=DIGITS),
    Operation("modulo", "number", "number", "x % {k}",
              "remainder by {k}", "take the remainder by {k}", constants=DIGITS),
    Operation("at_least", "number", "number", "max(x, {k})",
              "at least {k}", "raise it to at least {k}", constants=DIGITS),
    Operation("at_most", "number", "number", "min(x, {k})",
              "at most {k}", "limit it to {k}", target="cap it at {k}", constants=DIGITS),
    Operation("square", "number", "number", "x * x", "square", "multiply it by itself"),
    Operation("negate", "number", "number", "-x",
              "negate", "make it negative", target="flip its sign"),
    Operation("absolute", "number", "number", "abs(x)", "absolute", "drop its sign"),
    Operation("add_each", "list", "list", "[v + {k} for v in x]",
              "add {k} to each", "increase each item by {k}", constants=DIGITS),
    Operation("multiply_each", "list", "list", "[v * {k} for v in x]",
              "multiply each by {k}", "scale each item by {k}", constants=DIGITS),
    Operation("keep_above", "list", "list", "[v for v in x if v > {k}]",
              "keep above {k}", "keep the items above {k}", constants=DIGITS),
    Operation("keep_below", "list", "list", "[v for v in x if v < {k}]",
              "keep below {k}", "keep the items below {k}", target="keep the items under {k}",
              constants=DIGITS),
    Operation("append_item", "list", "list", "x + [{k}]",
              "append {k}", "put {k} at the end", constants=DIGITS),
    Operation("first_items", "list", "list", "x[:{k}]",
              "first {k}", "take the first {k} items", constants=DIGITS[:3]),
    Operation("skip_items", "list", "list", "x[{k}:]",
              "skip {k}", "remove the first {k} items", target="leave out the first {k} items",
              constants=DIGITS[:3]),
    Operation("sort", "list", "list", "sorted(x)", "sort", "put it in order"),
    Operation("reverse_list", "list", "list", "x[::-1]", "reverse", "turn it around"),
    Operation("evens", "list", "list", "[v for v in x if v % 2 == 0]",
              "keep even", "keep the even items"),
    Operation("sum", "list", "number", "sum(x)",
              "sum", "add up its items", target="total its items"),
    Operation("length", "list", "number", "len(x)", "length", "take its length"),
    Operation("count_item", "list", "number", "x.count({k})",
              "count {k}", "count the {k} in it", constants=DIGITS),
    Operation("append_letter", "string", "string", "x + '{k}'",
              "append {k}", "put {k} at the end", constants=LETTERS),
    Operation("prepend_letter", "string", "string", "'{k}' + x",
              "prepend {k}", "put {k} at the start", target="put {k} in front", constants=LETTERS),
    Operation("remove_letter", "string", "string", "x.replace('{k}', '')",
              "remove {k}", "remove every {k}", constants=LETTERS),
    Operation("repeat", "string", "string", "x * {k}",
              "repeat {k}", "repeat it {k} times", target="write it {k} times", constants=DIGITS),
    Operation("first_letters", "string", "string", "x[:{k}]",
              "first {k}", "take the first {k} letters", constants=DIGITS[:3]),
    Operation("skip_letters", "string", "string", "x[{k}:]",
              "skip {k}", "remove the first {k} letters", target="leave out the first {k} letters",
              constants=DIGITS[:3]),
    Operation("upper", "string", "string", "x.upper()",
              "upper", "make it upper case", target="make it capital"),
    Operation("reverse_string", "string", "string", "x[::-1]", "reverse", "turn it around"),
    Operation("count_letter", "string", "number", "x.count('{k}')",
              "count {k}", "count the {k} in it", constants=LETTERS),
    Operation("size", "string", "number", "len(x)", "length", "take its length"),
)

CONDITIONS = (
    Condition("above", "number", "x > {k}", "above {k}", "it is above {k}"),
    Condition("below", "number", "x < {k}",
              "below {k}", "it is below {k}", target="it is under {k}"),
    Condition("divisible", "number", "x % {k} == 0", "divides by {k}", "{k} divides it"),
    Condition("has_item", "list", "{k} in x", "has {k}", "it contains {k}"),
    Condition("longer_list", "list", "len(x) > {k}",
              "longer than {k}", "it is longer than {k}", constants=DIGITS[:4]),
    Condition("has_letter", "string", "'{k}' in x",
              "has {k}", "it contains {k}", constants=LETTERS),
    Condition("longer_string", "string", "len(x) > {k}",
              "longer than {k}", "it is longer than {k}", constants=DIGITS[:4]),
)
# fmt: on

PROBES: dict[Kind, tuple[Any, ...]] = {
    "number": (-13, -4, 0, 3, 6, 7, 10, 29, 72),
    "list": ([], [4], [3, 8, 2, 9, 5], [7, 7, 6, -2], [1, 5, 2, 4, 9, 6, 3], [8, 2, 3, 4]),
    "string": ("", "b", "opera", "dear poet", "abcde", "record", "cooperated"),
}
"""The inputs of the unit tests: edge cases, and both sides of each constant."""

_INDEX = {operation.name: index for index, operation in enumerate(OPERATIONS)}


@dataclass(frozen=True)
class Step:
    """An operation with its constant filled in (`constant` is empty where there is none)."""

    operation: Operation
    constant: str

    @property
    def code(self) -> str:
        return self.operation.code.format(k=self.constant)

    def words(self, style: Style) -> str:
        return _wording(self.operation, style).format(k=self.constant)


def _wording(part: Operation | Condition, style: Style) -> str:
    if style == "target" and part.target:
        return part.target
    return part.terse if style == "terse" else part.spoken


@dataclass(frozen=True)
class Task:
    """A task of one or two steps; the first runs where a `condition` holds, else the second."""

    kind: Kind
    steps: tuple[Step, ...]
    condition: Condition | None = None
    condition_constant: str = ""

    @property
    def task_id(self) -> str:
        names = [f"{step.operation.name}{step.constant}" for step in self.steps]
        if self.condition is not None:
            return f"{self.condition.name}{self.condition_constant}?" + ":".join(names)
        return ">".join(names)

    @property
    def composition(self) -> frozenset[str]:
        """The operations that meet here, without order."""
        return frozenset(step.operation.name for step in self.steps)

    def body(self) -> str:
        """Return the reference solution: the indented lines below `def f(x):`."""
        if self.condition is not None:
            test = self.condition.code.format(k=self.condition_constant)
            first, second = self.steps
            return f"    if {test}:\n        return {first.code}\n    return {second.code}"
        *early, last = self.steps
        return "".join(f"    x = {step.code}\n" for step in early) + f"    return {last.code}"

    def description(self, style: Style) -> str:
        """Return the task in words: "target" as users write, other styles for pretraining."""
        words = [step.words(style) for step in self.steps]
        kind = self.kind
        if self.condition is None:
            return {
                "terse": f"{kind}: " + "; ".join(words),
                "spoken": f"Take a {kind}, " + ", then ".join(words) + ".",
                "note": f"{', '.join(words)}. ({kind})",
                "target": f"Take the {kind} x, " + ", then ".join(words) + " and return it.",
            }[style]
        test = _wording(self.condition, style).format(k=self.condition_constant)
        return {
            "terse": f"{kind}: if {test}: {words[0]}; else: {words[-1]}",
            "spoken": f"Take a {kind}. If {test}, {words[0]}, else {words[-1]}.",
            "note": f"{words[0]} if {test}, else {words[-1]}. ({kind})",
            "target": f"Take the {kind} x. When {test}, {words[0]}, otherwise {words[-1]}.",
        }[style]


def is_held_out(composition: frozenset[str], seed: int) -> bool:
    """Return whether tasks of this composition are kept for evaluation; never a single step."""
    if len(composition) != 2:
        return False
    return (sum(_INDEX[name] for name in composition) + seed) % HELD_OUT_EVERY == 0


def run_on_probes(kind: Kind, body: str) -> list[Any]:
    """Return the values of `f` with this body on every probe of its kind, in order.

    Runs in this process: for the generator's own code, never for a model's completion.
    """
    namespace: dict[str, Any] = {}
    exec(FUNCTION_HEAD + body, namespace)
    return [namespace[ENTRY_POINT](value) for value in PROBES[kind]]


def unit_test(task: Task) -> str:
    """Return the source of `check(candidate)`, which compares each probe with the reference."""
    answers = run_on_probes(task.kind, task.body())
    lines = [
        f"    assert candidate({value!r}) == {answer!r}"
        for value, answer in zip(PROBES[task.kind], answers, strict=True)
    ]
    return "def check(candidate):\n" + "\n".join(lines) + "\n"


def checker_of(task: Task) -> dict[str, str]:
    """Return the checker of a row whose completion solves the task."""
    return {
        "kind": "python",
        "prompt": FUNCTION_HEAD,
        "entry_point": ENTRY_POINT,
        "test": unit_test(task),
    }


def _random_step(rng: random.Random, takes: Kind, gives: Kind | None = None) -> Step:
    choices = [o for o in OPERATIONS if o.takes == takes and gives in (None, o.gives)]
    operation = rng.choice(choices)
    return Step(operation, rng.choice(operation.constants))


def random_task(rng: random.Random, *, single_share: float, branch_share: float) -> Task:
    """Return a random task: a single step, a condition with two, or (the rest) a chain of two."""
    kind: Kind = rng.choice(("number", "list", "string"))
    draw = rng.random()
    if draw < single_share:
        return Task(kind, (_random_step(rng, kind),))
    if draw < single_share + branch_share:
        condition = rng.choice([c for c in CONDITIONS if c.takes == kind])
        first = _random_step(rng, kind)
        second = _random_step(rng, kind, first.operation.gives)
        return Task(kind, (first, second), condition, rng.choice(condition.constants))
    first = _random_step(rng, kind)
    return Task(kind, (first, _random_step(rng, first.operation.gives)))


def generate_tasks(
    rng: random.Random,
    seed: int,
    *,
    held_out: bool,
    single_share: float,
    branch_share: float,
    taken: set[str],
) -> Iterator[Task]:
    """Yield tasks from one side of the split without end, each at most once.

    `taken` grows with their ids, so that two calls that share it never yield the same task.
    """
    while True:
        task = random_task(rng, single_share=single_share, branch_share=branch_share)
        if is_held_out(task.composition, seed) != held_out or task.task_id in taken:
            continue
        taken.add(task.task_id)
        yield task


def corrupted_body(task: Task, rng: random.Random, seed: int) -> str:
    """Return a plausible wrong body: another similar step, another constant, or another order.

    It runs, fails at least one unit test and is of no held-out composition.
    """
    answers = run_on_probes(task.kind, task.body())
    while True:
        position = rng.randrange(len(task.steps))
        step = task.steps[position]
        mistake = rng.choice(("operation", "constant", "order"))
        if mistake == "order":
            steps = task.steps[::-1]
        else:
            other = Step(step.operation, rng.choice(step.operation.constants))
            if mistake == "operation":
                other = _random_step(rng, step.operation.takes, step.operation.gives)
            steps = (*task.steps[:position], other, *task.steps[position + 1 :])
        wrong = replace(task, steps=steps)
        fits = all(
            earlier.operation.gives == later.operation.takes for earlier, later in pairwise(steps)
        )
        if task.condition is None and not (fits and steps[0].operation.takes == task.kind):
            continue
        if is_held_out(wrong.composition, seed):
            continue
        if run_on_probes(task.kind, wrong.body()) != answers:
            return wrong.body()

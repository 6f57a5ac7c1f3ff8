"""How a dataset row says whether a completion is right.

A row may carry ``checker``:

    {"kind": "python", "prompt": …, "entry_point": …, "test": …}   its own unit tests (pass@1)
    {"kind": "exact_match", "answer": …}                           the text, stripped
    {"kind": "final_number", "answer": …}                          the last number (GSM8K)
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any

from shared.errors import DatasetError
from student_trainer.evaluation.sandbox import Program, check_sandbox, run_programs

_FIELDS = {
    "python": ("prompt", "entry_point", "test"),
    "exact_match": ("answer",),
    "final_number": ("answer",),
}
# Where a completion that continues a function has ended and something else begins.
_STOPS = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint", "\nassert ", "\n```")
_FENCE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)
_NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?")


@dataclass(frozen=True)
class Checker:
    """A checked ``checker`` of a row: its kind and its text fields by name."""

    kind: str
    fields: Mapping[str, str]


@dataclass(frozen=True)
class CheckResult:
    """The verdict on one completion."""

    kind: str
    passed: bool
    detail: str


def parse_checker(checker: Mapping[str, Any], where: str) -> Checker:
    """A usable checker.

    Raises:
        DatasetError: names the row and what is missing.
    """
    kind = checker.get("kind")
    if kind not in _FIELDS:
        raise DatasetError(f"{where}: checker kind {kind!r} is not one of {', '.join(_FIELDS)}")
    for name in _FIELDS[kind]:
        if not isinstance(checker.get(name), str):
            raise DatasetError(f"{where}: a {kind} checker needs {name!r} as text")
    return Checker(kind, {name: checker[name] for name in _FIELDS[kind]})


def check_completions(
    checkers: Sequence[Mapping[str, Any]],
    completions: Sequence[str],
    *,
    timeout: float = 5.0,
    workers: int | None = None,
    progress: bool = False,
    unsafe: bool = False,
) -> list[CheckResult]:
    """Verdicts in order; programs run in the sandbox, ``timeout`` seconds each.

    Raises:
        ConfigurationError: a fence is missing here, and ``unsafe`` is not set.
        DatasetError: a checker that cannot be used.
    """
    parsed = [parse_checker(checker, f"row {i}") for i, checker in enumerate(checkers)]
    pairs = list(zip(parsed, completions, strict=True))
    programs = [program_of(c, text) for c, text in pairs if c.kind == "python"]
    ran = iter(
        run_programs(programs, timeout=timeout, workers=workers, progress=progress, unsafe=unsafe)
    )
    results = []
    for checker, text in pairs:
        if checker.kind == "python":
            result = next(ran)
            results.append(
                CheckResult(checker.kind, result.passed, _explain(result.outcome, result.detail))
            )
        else:
            results.append(_compare(checker, text))
    return results


def missing_fences(checkers: Sequence[Mapping[str, Any]], *, unsafe: bool) -> list[str]:
    """The fences that the sandbox lacks here, where one of these checkers runs programs.

    Raises:
        ConfigurationError: there are some, and ``unsafe`` is not set.
    """
    if any(checker.get("kind") == "python" for checker in checkers):
        return check_sandbox(unsafe=unsafe)
    return []


def summarize(results: Sequence[CheckResult]) -> dict[str, float]:
    """Shares of right completions: ``pass@1`` of programs, ``exact_match`` of the rest."""
    shares = {}
    for name, kinds in (("pass@1", {"python"}), ("exact_match", {"exact_match", "final_number"})):
        verdicts = [result.passed for result in results if result.kind in kinds]
        if verdicts:
            shares[name] = sum(verdicts) / len(verdicts)
    return shares


def program_of(checker: Checker, completion: str) -> Program:
    """Prompt and completion as one program, with the row's tests.

    A completion continues the prompt, as in HumanEval, and is cut where something else begins. A
    chat model's fenced code is taken out of its fence; when it defines the entry point itself it
    replaces the prompt, whose lines before the function (imports, helpers) stay.
    """
    prompt, entry_point = checker.fields["prompt"], checker.fields["entry_point"]
    fenced = _FENCE.search(completion)
    body = fenced.group(1) if fenced else completion
    definition = re.compile(rf"^(?:async\s+)?def\s+{re.escape(entry_point)}\b", re.MULTILINE)
    if definition.search(body):
        own = definition.search(prompt)
        code = (prompt[: own.start()] if own else "") + "\n" + body
    else:
        ends = [at for stop in _STOPS if (at := body.find(stop)) >= 0]
        code = prompt + body[: min(ends, default=len(body))]
    return Program(code + "\n", entry_point, checker.fields["test"], context=prompt)


def final_number(text: str) -> Decimal | None:
    """The number after ``####``, else the last one; ``$1,000.50`` and ``1000.5`` are the same."""
    _, mark, answer = text.rpartition("####")
    found = _NUMBER.findall(answer if mark else text)
    if not found:
        return None
    digits = (found[0] if mark else found[-1]).replace(",", "").replace("$", "")
    try:
        return Decimal(digits)
    except InvalidOperation:
        return None


def _compare(checker: Checker, completion: str) -> CheckResult:
    answer = checker.fields["answer"]
    if checker.kind == "exact_match":
        passed, found = completion.strip() == answer.strip(), completion.strip()
    else:
        number = final_number(completion)
        passed, found = number is not None and number == final_number(answer), str(number)
    return CheckResult(checker.kind, passed, "" if passed else f"{found[:80]!r} is not {answer!r}")


def _explain(outcome: str, detail: str) -> str:
    return "" if outcome == "passed" else f"{outcome}: {detail}"

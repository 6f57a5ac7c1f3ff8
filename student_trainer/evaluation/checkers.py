"""Check whether completions are right, by the checkers of their dataset rows.

A row may carry ``checker``:

    {"kind": "python", "prompt": …, "entry_point": …, "test": …}   its own unit tests (pass@1)
    {"kind": "exact_match", "answer": …}                           the text, stripped
    {"kind": "final_number", "answer": …}                          the number (GSM8K), as `numbers`
                                                                   reads it

`extract` finds the program in a completion, `numbers` the number. Both ignore thoughts before the
answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shared.errors import DatasetError
from student_trainer.evaluation.extract import extract_code
from student_trainer.evaluation.numbers import equal_numbers, final_number
from student_trainer.evaluation.sandbox import Program, check_sandbox, run_programs

_FIELDS = {
    "python": ("prompt", "entry_point", "test"),
    "exact_match": ("answer",),
    "final_number": ("answer",),
}


@dataclass(frozen=True)
class Checker:
    """A validated ``checker`` of a row: its kind and its text fields by name."""

    kind: str
    fields: Mapping[str, str]


@dataclass(frozen=True)
class CheckResult:
    """The verdict on one completion."""

    kind: str
    passed: bool
    detail: str


def parse_checker(checker: Mapping[str, Any], where: str) -> Checker:
    """Validate the ``checker`` of a row.

    Raises:
        DatasetError: names the row and what is missing.
    """
    kind = checker.get("kind")
    if kind not in _FIELDS:
        raise DatasetError(f"{where}: checker kind {kind!r} is not one of {', '.join(_FIELDS)}")
    for name in _FIELDS[kind]:
        if not isinstance(checker.get(name), str):
            raise DatasetError(f"{where}: a {kind} checker needs {name!r} as text")
    if kind == "final_number" and final_number(checker["answer"]) is None:
        raise DatasetError(
            f"{where}: the answer {checker['answer']!r} of a final_number checker is no number"
        )
    return Checker(kind, {name: checker[name] for name in _FIELDS[kind]})


def check_completions(
    checkers: Sequence[Mapping[str, Any]],
    completions: Sequence[str],
    *,
    truncated: Sequence[bool] | None = None,
    timeout: float = 5.0,
    workers: int | None = None,
    progress: bool = False,
    unsafe: bool = False,
) -> list[CheckResult]:
    """Return verdicts in order; programs run in the sandbox for up to ``timeout`` seconds each.

    Args:
        checkers: one for each completion.
        completions: what the model wrote.
        truncated: which of them reached the length limit; by default none. In those only a number
            that is marked as the answer counts, and unfinished thoughts are no answer.
        timeout: seconds for each program.
        workers: programs that run at a time; by default one for each core.
        progress: show a bar.

    Raises:
        ConfigurationError: a fence is missing here, and ``unsafe`` is not set.
        DatasetError: a checker that cannot be used.
        ValueError: not as many checkers or marks as completions.
    """
    parsed = [parse_checker(checker, f"row {i}") for i, checker in enumerate(checkers)]
    cut = [False] * len(completions) if truncated is None else truncated
    items = list(zip(parsed, completions, cut, strict=True))
    programs = [program_of(c, text, truncated=cut) for c, text, cut in items if c.kind == "python"]
    ran = iter(
        run_programs(programs, timeout=timeout, workers=workers, progress=progress, unsafe=unsafe)
    )
    results = []
    for checker, text, cut_short in items:
        if checker.kind == "python":
            result = next(ran)
            results.append(
                CheckResult(checker.kind, result.passed, _explain(result.outcome, result.detail))
            )
        else:
            results.append(_compare(checker, text, cut_short))
    return results


def missing_fences(checkers: Sequence[Mapping[str, Any]], *, unsafe: bool) -> list[str]:
    """Return the fences that the sandbox lacks here, if one of these checkers runs programs.

    Raises:
        ConfigurationError: there are some, and ``unsafe`` is not set.
    """
    if any(checker.get("kind") == "python" for checker in checkers):
        return check_sandbox(unsafe=unsafe)
    return []


def summarize(results: Sequence[CheckResult]) -> dict[str, float]:
    """Return the shares of right completions: ``pass@1`` of programs, ``exact_match`` of others."""
    shares = {}
    for name, kinds in (("pass@1", {"python"}), ("exact_match", {"exact_match", "final_number"})):
        verdicts = [result.passed for result in results if result.kind in kinds]
        if verdicts:
            shares[name] = sum(verdicts) / len(verdicts)
    return shares


def program_of(checker: Checker, completion: str, *, truncated: bool = False) -> Program:
    """Return the program that a completion gives, with the row's tests."""
    prompt, entry_point = checker.fields["prompt"], checker.fields["entry_point"]
    code = extract_code(completion, prompt=prompt, entry_point=entry_point, truncated=truncated)
    return Program(code, entry_point, checker.fields["test"], context=prompt)


def _compare(checker: Checker, completion: str, truncated: bool) -> CheckResult:
    answer = checker.fields["answer"]
    if checker.kind == "exact_match":
        passed, found = completion.strip() == answer.strip(), completion.strip()
    else:
        number, right = final_number(completion, truncated=truncated), final_number(answer)
        passed = number is not None and right is not None and equal_numbers(number, right)
        found = str(number)
    return CheckResult(checker.kind, passed, "" if passed else f"{found[:80]!r} is not {answer!r}")


def _explain(outcome: str, detail: str) -> str:
    return "" if outcome == "passed" else f"{outcome}: {detail}"

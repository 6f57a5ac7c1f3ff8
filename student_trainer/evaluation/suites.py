"""Read problems from HumanEval, GSM8K, and rows that carry a checker."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from shared.errors import DatasetError
from student_trainer.config.arguments import DataArguments
from student_trainer.data.conversation import PlainText, form_of, json_value, read_row
from student_trainer.data.messages import Message
from student_trainer.evaluation.checkers import parse_checker

# Texts that only follow a complete function, from the paper (arXiv 2107.03374, section 3).
HUMANEVAL_STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
# The prompt for chat models and the beginning of their answer in EvalPlus (arXiv 2305.01210).
_INSTRUCTION = (
    "Please provide a self-contained Python script that solves the following problem in a markdown "
    "code block:\n```\n{prompt}\n```\n"
)
_BEGINNING = (
    "Below is a Python script with a self-contained function that solves the problem and passes "
    "corresponding tests:\n```python\n"
)
_CHAT_STOPS = ("\n```",)

_HUMANEVAL = {"task_id", "prompt", "entry_point", "test"}
_GSM8K = {"question", "answer"}


@dataclass(frozen=True)
class Problem:
    """A problem: the row that the model is given, with prompt or messages, and its checker.

    Attributes:
        task_id: name of the problem.
        row: ``{"prompt": text}``, or ``{"prompt": messages}`` with the chat template's other
            inputs, ``tools`` and ``chat_template_kwargs``.
        checker: as `checkers` reads it.
        answer: a right one, as text or as the assistant's message; "" where none is given.
        asked: "instruction" or "raw prompt", the two forms of a HumanEval prompt; "" elsewhere.
    """

    task_id: str
    row: dict[str, Any]
    checker: dict[str, Any]
    answer: str | Message
    asked: str = ""

    @property
    def reference(self) -> str:
        """The right answer as text, "" where none is given."""
        text = self.answer if isinstance(self.answer, str) else self.answer.get("content")
        return text if isinstance(text, str) else ""

    @property
    def answered(self) -> dict[str, Any] | None:
        """The row with its right answer as completion; None where none is given."""
        if not self.answer:
            return None
        completion = self.answer if isinstance(self.answer, str) else [self.answer]
        return {**self.row, "completion": completion}

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The strings that end a completion and are not part of it."""
        return {"raw prompt": HUMANEVAL_STOPS, "instruction": _CHAT_STOPS}.get(self.asked, ())


def problems_of(
    rows: Sequence[tuple[str, dict[str, Any]]], form: str, *, chat: bool = False
) -> list[Problem]:
    """Return the problems of (where, row) pairs in one of the forms.

    Args:
        form: "humaneval", "gsm8k", "rows", or "auto" to tell it from the first row.
        chat: give HumanEval's problems as a conversation: an instruction, and the prompt in a
            fence. Otherwise the model continues the prompt, as in the paper.

    Raises:
        DatasetError: names the first row that is not of that form.
    """
    humaneval = _humaneval_chat if chat else _humaneval
    readers = {"humaneval": humaneval, "gsm8k": _gsm8k, "rows": _checked_row}
    name = _detect(*rows[0]) if form == "auto" else form
    return [readers[name](where, row) for where, row in rows]


def _detect(where: str, row: dict[str, Any]) -> str:
    if "checker" in row:
        return "rows"
    if row.keys() >= _HUMANEVAL:
        return "humaneval"
    if row.keys() >= _GSM8K:
        return "gsm8k"
    raise DatasetError(
        f"{where}: neither a checker, nor HumanEval's nor GSM8K's fields; the row has "
        f'{sorted(row)}. Give each row one, such as "checker": {{"kind": "exact_match", '
        '"answer": "4"}'
    )


def _humaneval(where: str, row: dict[str, Any]) -> Problem:
    _require(where, row, _HUMANEVAL)
    checker = {"kind": "python", **{n: row[n] for n in ("prompt", "entry_point", "test")}}
    reference = str(row.get("canonical_solution", ""))
    return Problem(str(row["task_id"]), {"prompt": row["prompt"]}, checker, reference, "raw prompt")


def _humaneval_chat(where: str, row: dict[str, Any]) -> Problem:
    """Return a HumanEval problem as an instruction, whose answer is the whole function."""
    raw = _humaneval(where, row)
    prompt = str(row["prompt"])
    turns = [
        {"role": "user", "content": _INSTRUCTION.format(prompt=prompt.strip())},
        {"role": "assistant", "content": _BEGINNING},
    ]
    answer = f"{prompt.strip()}\n{raw.reference.rstrip()}"
    return Problem(
        raw.task_id,
        {"prompt": turns},
        raw.checker,
        f"{answer}\n```" if raw.reference else "",
        "instruction",
    )


def _gsm8k(where: str, row: dict[str, Any]) -> Problem:
    _require(where, row, _GSM8K)
    question, answer = str(row["question"]), str(row["answer"])
    number = answer.rpartition("####")[2].strip()
    messages = [{"role": "user", "content": question}]
    checker = {"kind": "final_number", "answer": number}
    return Problem(where, {"prompt": messages}, checker, answer)


def _checked_row(where: str, row: dict[str, Any]) -> Problem:
    """Return the problem of a row of any training form that also has a checker."""
    _require(where, row, {"checker"})
    checker = json_value(where, "checker", row["checker"])
    if not isinstance(checker, dict):
        raise DatasetError(f"{where}: checker must be an object")
    parse_checker(checker, where)
    task_id = str(row.get("task_id", where))
    if form_of(row, DataArguments()) is None:
        _require(where, row, {"prompt"})
    read = read_row(where, row, DataArguments())
    if isinstance(read, PlainText):
        return Problem(task_id, {"prompt": read.prompt}, checker, read.completion or "")
    given = {
        "prompt": read.prompt,
        "tools": read.tools,
        "chat_template_kwargs": dict(read.template_kwargs),
    }
    answer = "" if read.completion is None else read.completion
    return Problem(task_id, {k: v for k, v in given.items() if v}, checker, answer)


def _require(where: str, row: dict[str, Any], names: set[str]) -> None:
    missing = sorted(names - row.keys())
    if missing:
        raise DatasetError(f"{where}: {', '.join(missing)} missing; the row has {sorted(row)}")

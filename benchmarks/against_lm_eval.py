"""A comparison of `student-trainer evaluate` with lm-eval, problem by problem.

    python -m benchmarks.against_lm_eval --ours scores --theirs samples_TASK_….jsonl --json FILE

Two programs that measure one model differ in the prompt, in what ends an answer, in rounding, and
in how they read the answer. Each verdict is therefore given on each program's answers: where only
the reading differs, both verdicts on one text do. lm-eval's reading of a program (cut at the fence,
behind the prompt) and of a number (the last one) is that of its tasks `humaneval`,
`humaneval_instruct` and `gsm8k`; programs run in the sandbox here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import argument_parser, print_report
from student_trainer.evaluation.checkers import check_completions
from student_trainer.evaluation.sandbox import Program, run_programs

NUMBER = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")  # lm-eval's "flexible-extract"
NOTES = ("our reading, their reading: of right answers, by evaluate and by lm-eval's task.",)


@dataclass(frozen=True)
class Answers:
    """One program's answers to all problems, in their order.

    Attributes:
        cut: which were cut by the length limit, as far as is known.
        whole: the answers have the whole function, so lm-eval's reading puts no prompt in front.
    """

    texts: Sequence[str]
    cut: Sequence[bool]
    whole: bool


def read_ours(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of ``samples.jsonl`` that `evaluate` writes."""
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def read_theirs(file: Path) -> list[dict[str, Any]]:
    """Return the lines of lm-eval's ``--log_samples``, one a problem, in the problems' order."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return [row for _, row in sorted({row["doc_id"]: row for row in rows}.items())]


def checker_of(doc: Mapping[str, str]) -> dict[str, str]:
    """Return our checker of a row of HumanEval or GSM8K."""
    if "entry_point" in doc:
        return {"kind": "python", **{n: doc[n] for n in ("prompt", "entry_point", "test")}}
    return {"kind": "final_number", "answer": doc["answer"].rpartition("####")[2].strip()}


def by_our_reading(docs: Sequence[Mapping[str, str]], answers: Answers) -> list[bool]:
    checkers = [checker_of(doc) for doc in docs]
    found = check_completions(checkers, answers.texts, truncated=answers.cut)
    return [one.passed for one in found]


def by_their_reading(docs: Sequence[Mapping[str, str]], answers: Answers) -> list[bool]:
    """Return the verdicts of lm-eval's tasks on some answers."""
    if "entry_point" not in docs[0]:
        return [_number(text) == _number(doc["answer"])
                for doc, text in zip(docs, answers.texts, strict=True)]  # fmt: skip
    programs = []
    for doc, text in zip(docs, answers.texts, strict=True):
        code = ("" if answers.whole else doc["prompt"]) + text.partition("```")[0]
        programs.append(Program(code, doc["entry_point"], doc["test"]))
    return [one.passed for one in run_programs(programs, timeout=5.0)]


def _number(text: str) -> str | None:
    found = NUMBER.findall(text)
    return re.sub(r"[,$]|\.$", "", next(filter(None, found[-1]))) if found else None


def compared(docs: Sequence[Mapping[str, str]], ours: Answers, theirs: Answers) -> dict[str, Any]:
    """Return counts of right answers by each reading of each text, and the problems that differ.

    ``read_differently`` names the problems where both readings of one text disagree, and
    ``answered_differently`` those where our reading of the two texts does.
    """
    verdicts = {
        (text, reading): read(docs, answers)
        for text, answers in (("ours", ours), ("theirs", theirs))
        for reading, read in (("ours", by_our_reading), ("theirs", by_their_reading))
    }
    numbers = range(len(docs))
    unequal = {
        text: [n for n in numbers if verdicts[text, "ours"][n] != verdicts[text, "theirs"][n]]
        for text in ("ours", "theirs")
    }
    changed = [n for n in numbers if verdicts["ours", "ours"][n] != verdicts["theirs", "ours"][n]]
    return {
        "problems": len(docs),
        "same_text": sum(a.strip() == b.strip()
                         for a, b in zip(ours.texts, theirs.texts, strict=True)),
        **{f"our_reading_of_{text}": sum(verdicts[text, "ours"]) for text in unequal},
        **{f"their_reading_of_{text}": sum(verdicts[text, "theirs"]) for text in unequal},
        "read_differently": {
            text: [[n, "ours" if verdicts[text, "ours"][n] else "theirs"] for n in found]
            for text, found in unequal.items()
        },
        "answered_differently": changed,
    }  # fmt: skip


def main() -> None:
    parser = argument_parser(__doc__, quick="has no effect: nothing is generated here")
    parser.add_argument("--ours", type=Path, required=True, help="--output_dir of evaluate")
    parser.add_argument("--theirs", type=Path, required=True, help="samples_*.jsonl of lm-eval")
    parser.add_argument(
        "--whole",
        nargs="*",
        choices=("ours", "theirs"),
        default=(),
        help="whose answers have the whole function, not its body alone",
    )
    parser.add_argument("--json", type=Path, help="file for the result")
    arguments = parser.parse_args()
    samples, rows = read_ours(arguments.ours), read_theirs(arguments.theirs)
    if len(samples) != len(rows):
        parser.error(f"{len(samples)} answers in --ours, {len(rows)} in --theirs: same rows, --n 1")
    docs = [row["doc"] for row in rows]
    ours = Answers(
        [one["completion"] for one in samples],
        [one["truncated"] for one in samples],
        "ours" in arguments.whole,
    )
    texts = [row["resps"][0][0] for row in rows]
    cut = [one["truncated"] and one["completion"].strip() == text.strip()
           for one, text in zip(samples, texts, strict=True)]  # fmt: skip
    found = compared(docs, ours, Answers(texts, cut, "theirs" in arguments.whole))
    if arguments.json:
        arguments.json.write_text(json.dumps(found) + "\n")
    print_report(
        f"{found['problems']} problems, {found['same_text']} with the same text",
        ["answers of", "our reading", "their reading", "read differently"],
        [
            [text, found[f"our_reading_of_{text}"], found[f"their_reading_of_{text}"],
             ", ".join(f"{n} ({who} passes)" for n, who in found["read_differently"][text])]
            for text in ("ours", "theirs")
        ],
        {"benchmark": "against_lm_eval", **{k: v for k, v in found.items() if isinstance(v, int)}},
        notes=NOTES,
    )  # fmt: skip


if __name__ == "__main__":
    main()

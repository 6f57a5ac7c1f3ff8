"""Write rows of code instructions, without those that resemble a problem of HumanEval.

    python -m examples.deepseek_coder.prepare --output train.jsonl

A row needs two columns of text, an instruction and its answer. They become ``prompt`` and
``completion`` in plain text: the base models of DeepSeek-Coder have no chat template.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from shared.errors import DatasetError
from student_trainer.config.suites import HUB
from student_trainer.data.rows import load_rows

Row = dict[str, Any]

# The format of deepseek-coder's own instruction tuning.
PROMPT = "### Instruction:\n{}\n### Response:\n"
# Texts that share this many successive words are not alike by chance; see the README.
N = 10


def word_runs(text: str) -> Iterator[tuple[str, ...]]:
    """Yield all runs of `N` words of a text, whatever its case, layout and punctuation.

    A text of fewer words is one run.
    """
    words = re.findall(r"[^\W\d]+", text.lower())
    for first in range(max(1, len(words) - N + 1)):
        yield tuple(words[first : first + N])


def without(rows: Iterable[Row], problems: Sequence[Row]) -> Iterator[Row]:
    """Yield the rows that share no run of words with a problem's text, solution or tests.

    Args:
        rows: with ``prompt`` and ``completion``.
        problems: as HumanEval is published.
    """
    known = {
        run
        for problem in problems
        for name in ("prompt", "canonical_solution", "test")
        for run in word_runs(problem[name])
        if len(run) == N
    }
    for row in rows:
        if known.isdisjoint(word_runs(f"{row['prompt']}\n{row['completion']}")):
            yield row


def as_rows(found: Iterable[tuple[str, Row]], prompt: str, completion: str) -> Iterator[Row]:
    """Yield rows with ``prompt`` and ``completion`` from (where, row) pairs.

    Raises:
        DatasetError: a row has no text in one of the two columns.
    """
    for where, row in found:
        task, answer = row.get(prompt), row.get(completion)
        if not isinstance(task, str) or not isinstance(answer, str) or not answer.strip():
            raise DatasetError(f"{where}: {prompt!r} and {completion!r} must be text")
        yield {"prompt": PROMPT.format(task.strip()), "completion": answer.strip()}


def main(argv: Sequence[str] | None = None) -> None:
    """Write the JSONL file that the arguments name."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="JSONL file to write")
    parser.add_argument("--dataset_name", default="ise-uiuc/Magicoder-OSS-Instruct-75K")
    parser.add_argument("--dataset_split", default="train")
    parser.add_argument("--prompt_column", default="problem")
    parser.add_argument("--completion_column", default="solution")
    parser.add_argument("--humaneval", default=HUB["humaneval"][0], help="Hub id, or the file")
    args = parser.parse_args(argv)
    problems = load_rows(args.humaneval, config=None, split=HUB["humaneval"][2])
    found = load_rows(args.dataset_name, config=None, split=args.dataset_split)
    rows = list(as_rows(found, args.prompt_column, args.completion_column))
    kept = list(without(rows, [problem for _, problem in problems]))
    args.output.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    print(f"{len(kept)} rows in {args.output}; {len(rows) - len(kept)} resembled HumanEval")


if __name__ == "__main__":
    main()

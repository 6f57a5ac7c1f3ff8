"""Make rows to learn from of what a model wrote: questions and an evaluation's completions.

    python -m examples.pruned_coder.answers --questions FILE.jsonl --samples DIR --output_dir DIR

The folder then holds answers.jsonl. An answer that was cut by the length limit is left out, since
whoever learns it never learns to end.
"""

import argparse
import json
from pathlib import Path

from examples.mini_humaneval.folder import Row, write_rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--questions", type=Path, required=True)
    parser.add_argument("--samples", type=Path, required=True, help="output of evaluate")
    parser.add_argument("--output_dir", type=Path, required=True)
    arguments = parser.parse_args()
    answers = answered(_read(arguments.questions), _read(arguments.samples / "samples.jsonl"))
    write_rows(arguments.output_dir, {"answers": answers})


def answered(questions: list[Row], samples: list[Row]) -> list[Row]:
    """Return the questions with their answers, in order, without those that were cut."""
    completions = {one["task_id"]: one["completion"] for one in samples if not one["truncated"]}
    return [
        row | {"messages": [*row["messages"], {"role": "assistant", "content": text}]}
        for row in questions
        if (text := completions.get(row["task_id"])) is not None
    ]


def _read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    main()

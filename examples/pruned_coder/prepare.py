"""Write the tasks of mini-HumanEval as questions to a chat model that writes code.

    python -m examples.pruned_coder.prepare --output_dir DIR

The folder then holds labelled.jsonl (right answers, to learn from), questions.jsonl (the same rows
without the answers) and held_out.jsonl. No task of one file occurs in another but as said.
"""

import argparse
import random
from itertools import islice
from pathlib import Path

from examples.mini_humaneval.folder import Row, write_rows
from examples.mini_humaneval.tasks import (
    FUNCTION_HEAD,
    Task,
    checker_of,
    generate_tasks,
)

# So that a model of half a billion parameters answers with code and little else.
SYSTEM = "You write short Python functions. Answer with the code only."
# Conditions; the rest are chains of two steps.
BRANCH_SHARE = 0.35
LABELLED_ROWS = 512
# One standard error of pass@1 is at most .045 at this size.
HELD_OUT_ROWS = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--labelled", type=int, default=LABELLED_ROWS, metavar="N")
    parser.add_argument("--held_out", type=int, default=HELD_OUT_ROWS, metavar="N")
    arguments = parser.parse_args()
    write_rows(
        arguments.output_dir,
        make_dataset(labelled=arguments.labelled, held_out=arguments.held_out),
    )


def make_dataset(
    *, labelled: int = LABELLED_ROWS, held_out: int = HELD_OUT_ROWS
) -> dict[str, list[Row]]:
    """Return the rows of each file by its name; the same numbers give the same rows."""
    rng = random.Random("pruned-coder")
    taken: set[str] = set()

    def draw(count: int, *, held_out: bool) -> list[Row]:
        tasks = generate_tasks(
            rng, 0, held_out=held_out, single_share=0.0, branch_share=BRANCH_SHARE, taken=taken
        )
        return [row_of(task) for task in islice(tasks, count)]

    tested = draw(held_out, held_out=True)
    learned = draw(labelled, held_out=False)
    return {
        "labelled": learned,
        "questions": [row | {"messages": row["messages"][:-1]} for row in learned],
        "held_out": tested,
    }


def row_of(task: Task) -> Row:
    """Return a conversation with the right answer, and the checker of other answers."""
    return {
        "messages": [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": f"Function f(x): {task.description('target')}"},
            {"role": "assistant", "content": f"```python\n{FUNCTION_HEAD}{task.body()}\n```"},
        ],
        "task_id": task.task_id,
        "checker": checker_of(task),
    }


if __name__ == "__main__":
    main()

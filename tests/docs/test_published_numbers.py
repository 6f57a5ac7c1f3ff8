"""The comparison with lm-eval in docs/how-to/benchmarks.md has the numbers of its JSON file."""

import json
import re
from pathlib import Path

import yaml

from student_trainer.evaluation.suites import problems_of

ROOT = Path(__file__).parents[2]
FOUND = json.loads((ROOT / "docs/results/published.json").read_text())
PAGE = (ROOT / "docs/how-to/benchmarks.md").read_text()
TASK = yaml.safe_load((ROOT / "benchmarks/lm_eval/humaneval_alike.yaml").read_text())


def test_the_table():
    rows = re.findall(r"^\| (.+?), .+? \| first (\d+) \| (\d+) \| (\d+) \|$", PAGE, re.MULTILINE)
    all_, both = FOUND["lm_eval"], FOUND["both_wrote"]
    expected = [
        ("lm-eval's", all_["first_problems"], all_["our_reading"], all_["their_reading"]),
        ("lm-eval's", both["first_problems"], both["lm_eval_read_by_us"], both["lm_eval"]),
        ("`evaluate`'s", both["first_problems"], both["ours"], both["ours_read_as_lm_eval"]),
    ]
    assert rows == [tuple(map(str, row)) for row in expected]


def test_the_text():
    words = re.sub(r"\s+", " ", PAGE)
    all_, both = FOUND["lm_eval"], FOUND["both_wrote"]
    *some, last = [number for number, who in all_["read_differently"] if who == "ours"]
    assert f"only ours passes (problems {', '.join(map(str, some))} and {last})" in words
    assert len(all_["read_differently"]) == len(some) + 1 == 4
    assert f"{both['same_text']} of {both['first_problems']} are the same" in words
    assert both["answered_differently"] == []
    assert (
        f"as published (EvalPlus, 768 tokens) | {FOUND['published']:.3f}".replace("0.", ".") in PAGE
    )


def test_the_task_asks_as_evaluate_does():
    row = {"task_id": "t", "prompt": "\ndef f():\n", "entry_point": "f", "test": "t"}
    [problem] = problems_of([("row", row)], "humaneval", chat=True)
    asked, begun = (turn["content"] for turn in problem.row["prompt"])
    assert TASK["doc_to_text"].replace("{{ prompt.strip() }}", row["prompt"].strip()) == asked
    assert TASK["gen_prefix"] == begun
    assert tuple(TASK["generation_kwargs"]["until"]) == problem.stop_strings

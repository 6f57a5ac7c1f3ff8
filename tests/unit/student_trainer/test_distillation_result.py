"""The result of `distill` is shown in a line."""

from pathlib import Path

from student_trainer.api import DistillationResult


def test_it_tells_steps_and_divergence():
    history = [{"step": 3, "train/divergence": 0.12345}, {"step": 4, "train/runtime": 2.0}]
    metrics = {name: value for entry in history for name, value in entry.items()}
    result = DistillationResult(Path("out"), metrics, history, None, False)
    assert repr(result) == "DistillationResult('out', 4 steps, divergence 0.123)"

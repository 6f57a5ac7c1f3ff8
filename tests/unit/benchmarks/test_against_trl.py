"""The comparison with TRL counts the steps of both trainers by the lines that they log."""

import sys

import pytest

from benchmarks import against_trl
from student_trainer.reporting.lines import window_line

LINES = {
    "ours": ("stderr", [window_line({"train/loss": 0.5}, step=n, steps=4) for n in range(1, 5)]),
    "TRL's": ("stdout", [f"{{'loss': 0.{n}, 'epoch': 1}}" for n in range(1, 5)]),
}


@pytest.mark.parametrize("trainer", LINES)
def test_each_step_that_is_logged_counts(tmp_path, trainer):
    stream, lines = LINES[trainer]
    script = (
        "import sys, time\n"
        f"for line in ['method  on-policy GKD', *{lines!r}, 'Done: 4 steps in 2 s']:\n"
        f"    print(line, file=sys.{stream}, flush=True)\n"
        "    time.sleep(0.02)\n"
    )
    coins = [True, False, True, False]
    with against_trl.started(
        [sys.executable, "-c", script], tmp_path / "trainer.log", reads=stream
    ) as process:
        run = against_trl.watched(tmp_path, coins, process)
    assert [len(run.seconds[kind]) for kind in (True, False)] == [1, 1]  # after the warm-up
    assert all(0 < seconds < 5 for kind in run.seconds.values() for seconds in kind)
    assert run.trainer_memory > 0


def test_a_trainer_that_logs_too_few_steps_is_an_error(tmp_path):
    with (
        against_trl.started(
            [sys.executable, "-c", ""], tmp_path / "log", reads="stderr"
        ) as process,
        pytest.raises(RuntimeError, match="after 0 steps"),
    ):
        against_trl.watched(tmp_path, [True], process)

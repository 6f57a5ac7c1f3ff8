"""A line for each window and evaluation; above a bar in a terminal, alone elsewhere."""

import io
import logging

import pytest
from transformers import TrainerControl, TrainerState

from student_trainer.training import run_lines
from student_trainer.training.run_lines import RunLines

WINDOW = {
    "train/loss": 0.5, "train/divergence": 0.5, "train/top1_agreement": 0.75, "time/step": 2.0,
    "train/completion_length": 12.0, "time/stall_fraction": 0.5,
}  # fmt: skip


class Stream(io.StringIO):
    encoding = "utf-8"
    terminal = False

    def isatty(self):
        return self.terminal


class Terminal(Stream):
    terminal = True


class Ascii(Stream):
    encoding = "ascii"


def written(stream, monkeypatch, *, bar, log=lambda: None, main=True):
    """Return what three steps, two windows and an evaluation write."""
    monkeypatch.setattr("sys.stderr", stream)
    state = TrainerState(max_steps=40, global_step=0, is_world_process_zero=main)
    lines, control = RunLines(bar=bar), TrainerControl()
    lines.on_train_begin(None, state, control)
    for step in (1, 2, 3):
        state.global_step = step
        lines.on_step_end(None, state, control)
        if step < 3:
            lines.on_log(None, state, control, logs=WINDOW)
    log()
    lines.on_log(None, state, control, logs={"eval/divergence": 0.25})
    lines.on_log(None, state, control, logs={"train/runtime": 3.0})
    lines.close()
    return stream.getvalue()


def test_a_file_gets_whole_plain_lines(monkeypatch):
    first, second, third = written(Stream(), monkeypatch, bar=False).splitlines()
    assert first == (
        "step 1/40 · 2 s/step · 78 s left · loss .5 · divergence .5 · top-1 .75 · length 12 · "
        "teacher wait 50 %"
    )
    assert second.startswith("step 2/40 · 2 s/step · 0.0 s left")  # by the clock, after one step
    assert third == "step 3/40 · held out · divergence .25"


def test_another_rank_writes_nothing(monkeypatch):
    assert written(Stream(), monkeypatch, bar=True, main=False) == ""


def test_a_stream_that_knows_ascii_alone_gets_ascii(monkeypatch):
    assert "step 3/40 | held out | divergence .25" in written(Ascii(), monkeypatch, bar=False)


@pytest.mark.parametrize("columns", ["80", "40"])
def test_lines_fit_the_terminal_and_no_line_and_bar_share_a_row(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    handler = logging.StreamHandler(stream := Terminal())
    monkeypatch.setattr(logging.root, "handlers", [handler])
    text = written(stream, monkeypatch, bar=True, log=lambda: logging.warning("a record"))
    assert logging.root.handlers == [handler]
    rows = text.split("\n")
    for row in rows[:-1]:
        shown = row.rsplit("\r", 1)[-1]  # what stays of a row that is written over
        assert shown.startswith(("step", "a record"))
        assert len(shown) <= int(columns)
    assert len(rows) == 5


def test_checkpoints_leave_no_bars_between_the_lines(monkeypatch):
    enabled = []
    monkeypatch.setattr(run_lines.transformers_logging, "_tqdm_active", True)
    ask = run_lines.transformers_logging.is_progress_bar_enabled
    written(Terminal(), monkeypatch, bar=True, log=lambda: enabled.append(ask()))
    assert enabled == [False]
    assert ask()

"""The lines of a run, for people: what they hold, and what goes first where there is no room."""

import pytest

from student_trainer.reporting.lines import held_out_line, number, readable_seconds, window_line
from student_trainer.reporting.names import grouped

WINDOW = grouped({
    "loss": 0.04672, "grad_norm": 0.5, "learning_rate": 1e-3, "divergence": 0.04672,
    "top1_agreement": 0.9, "completion_length": 18.7, "stall_fraction": 0.17, "seconds_step": 0.24,
    "teacher_entropy": 1.5,
})  # fmt: skip
WHOLE = (
    "step 120/400 · 0.24 s/step · 67 s left · loss .0467 · divergence .0467 · top-1 .90 · "
    "length 19 · teacher wait 17 %"
)


def line(metrics, width=None, left=67.2):
    return window_line(metrics, step=120, steps=400, seconds_left=left, width=width)


def test_a_window_is_one_line():
    assert line(WINDOW) == WHOLE


def test_what_a_method_does_not_measure_is_left_out():
    sft = {"train/loss": 2.3456, "train/completion_length": 31.0, "time/step": 12.3}
    assert line(sft) == "step 120/400 · 12 s/step · 67 s left · loss 2.35 · length 31"
    assert line(sft, left=None) == "step 120/400 · 12 s/step · loss 2.35 · length 31"


def test_skipped_steps_stay_when_there_is_little_room():
    assert line({**WINDOW, "train/skipped_steps": 2}, width=55).endswith("2 not finite, skipped")


@pytest.mark.parametrize(
    ("width", "expected"),
    [
        (120, WHOLE),
        (105, WHOLE.replace(" · length 19", "")),
        (99, WHOLE.replace(" · top-1 .90 · length 19", "")),
        (80, "step 120/400 · 0.24 s/step · 67 s left · divergence .0467 · teacher wait 17 %"),
        (60, "step 120/400 · 0.24 s/step · 67 s left · divergence .0467"),
        (45, "step 120/400 · 67 s left · divergence .0467"),
        (1, "step 120/400 · divergence .0467"),
    ],
)  # fmt: skip
def test_what_matters_least_goes_where_there_is_no_room(width, expected):
    assert line(WINDOW, width) == expected


def test_an_evaluation_has_a_line_of_its_own():
    metrics = grouped({
        "eval_loss": 0.0431, "eval_divergence": 0.0431, "eval_exact_match": 0.5, "eval_pass@1": 1.0,
        "eval_runtime": 3.14, "eval_samples_per_second": 5.0,
    })  # fmt: skip
    assert held_out_line(metrics, step=120, steps=400) == (
        "step 120/400 · held out · divergence .0431 · exact match .50 · pass@1 1.00 · 3.1 s"
    )
    assert held_out_line(metrics, step=120, steps=400, width=50) == (
        "step 120/400 · held out · divergence .0431"
    )
    assert held_out_line({"eval/loss": 1.5}, step=0, steps=9) == "step 0/9 · held out · loss 1.5"


TWO = {"train/divergence/math": 0.0513, "train/divergence/code": 0.0432}


@pytest.mark.parametrize(
    ("width", "expected"),
    [
        (None, WHOLE.replace(".0467 · top-1", ".0467 · math .0513, code .0432 · top-1")),
        (
            120,
            "step 120/400 · 0.24 s/step · 67 s left · loss .0467 · divergence .0467 · "
            "math .0513, code .0432 · teacher wait 17 %",
        ),
        (80, "step 120/400 · 0.24 s/step · 67 s left · divergence .0467 · teacher wait 17 %"),
    ],
    ids=["file", "wide", "narrow"],
)  # fmt: skip
def test_several_teachers_stand_behind_their_sum(width, expected):
    found = line(WINDOW | TWO, width)
    assert found == expected
    assert width is None or len(found) <= width


@pytest.mark.parametrize(
    ("width", "expected"),
    [
        (120, "step 20/60 · held out · divergence .0885 · math .0661, code .103 · pass@1 .25 · "
              "context divergence .0633 · 4.1 s"),
        (80, "step 20/60 · held out · divergence .0885 · math .0661, code .103 · pass@1 .25"),
        (70, "step 20/60 · held out · divergence .0885 · math .0661, code .103"),
    ],
    ids=["wide", "narrow", "narrower"],
)  # fmt: skip
def test_what_is_the_same_in_each_evaluation_goes_before_what_is_of_a_teacher(width, expected):
    metrics = {
        "eval/divergence": 0.0885, "eval/loss": 0.0885, "eval/context_divergence": 0.0633,
        "eval/divergence/math": 0.0661, "eval/divergence/code": 0.103, "eval/pass@1": 0.25,
        "eval/runtime": 4.1,
    }  # fmt: skip
    assert held_out_line(metrics, step=20, steps=60, width=width) == expected


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0467, ".0467"), (-0.5, "-.5"), (10.04, "10"), (12.345, "12.3"), (1234.5, "1234"),
     (0.0, "0"), (1e-5, "1e-05"), (float("nan"), "nan"), (20.05, "20.1"), (999.7, "1000")],
)  # fmt: skip
def test_numbers_have_three_digits(value, text):
    assert number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.31, "0.3 s"), (42.4, "42 s"), (95, "95 s"), (240, "4 min"), (11_100, "3 h 05 min")],
)
def test_durations_have_the_unit_that_suits_them(seconds, text):
    assert readable_seconds(seconds) == text

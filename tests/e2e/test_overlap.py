"""Timing never changes what is learned, however far ahead of the weights the pipeline works."""

import json
import shutil
import threading
from collections import Counter

import numpy as np
import pytest
from safetensors.torch import load_file
from transformers import AutoTokenizer

from shared.identity import tokenizer_identity
from student_trainer.commands.main import main
from tests.support import stub
from tests.support.paced import PacedTeacher
from tests.support.trainer_process import train_on_two_ranks


@pytest.fixture
def paced(unserved_world):
    """Serves a teacher with scores of its own, whose delays are drawn from a seed, or none."""
    tokenizer = tokenizer_identity(AutoTokenizer.from_pretrained(unserved_world.student))

    def serving(delays=None):
        lock, rng = threading.Lock(), np.random.default_rng(delays)

        def seconds_for(tokens):
            with lock:
                return 0.0 if delays is None else float(rng.exponential(0.03))

        info = stub.info(tokenizer=tokenizer, vocab_size=260, max_model_len=256)
        return stub.serving(PacedTeacher(info, seconds_for, one_at_a_time=False))

    return serving


def words(world, url, output, **options):
    settings = {
        "model_name_or_path": world.student,
        "dataset_name": world.rows,
        "output_dir": output,
        "teacher_url": url,
        "top_k_logprobs": 16,
        "max_new_tokens": 12,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "generation_batch_size": 3,
        "learning_rate": 1e-2,
        "max_steps": 8,  # an epoch has 6
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": "true",
        **options,
    }
    return ["distill", *(f"--{name}={value}" for name, value in settings.items())]


def log(output):
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in history if "train/loss" in entry]


def assert_same_to_the_last_bit(a, b):
    for left, right in zip(log(a), log(b), strict=True):
        for name in ("train/loss", "train/divergence", "train/grad_norm"):
            assert left[name] == right[name], (left["step"], name)
    one, two = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    assert all((one[name] == two[name]).all() for name in one)


@pytest.mark.parametrize(
    "method",
    [
        {"lmbda": 1, "rollout_staleness": 0},
        {"lmbda": 1, "rollout_staleness": 1},
        {"lmbda": 0.5, "rollout_staleness": 1, "teacher_prefetch_steps": 3},
        {"lmbda": 0, "teacher_prefetch_steps": 3},
    ],
)
def test_losses_are_the_same_however_long_the_teacher_takes(
    unserved_world, paced, tmp_path, method
):
    for name, delays in (("at once", None), ("late", 1)):
        with paced(delays) as url:
            assert main(words(unserved_world, url, tmp_path / name, **method)) == 0
    assert_same_to_the_last_bit(tmp_path / "at once", tmp_path / "late")


def test_two_processes_learn_the_same_however_long_the_teacher_takes(
    unserved_world, paced, tmp_path
):
    for name, delays in (("at once", None), ("late", 1)):
        with paced(delays) as url:
            options = {"lmbda": 0.5, "rollout_staleness": 1, "gradient_accumulation_steps": 2}
            flags = words(unserved_world, url, tmp_path / name, **options)
            train_on_two_ranks(flags)
    assert_same_to_the_last_bit(tmp_path / "at once", tmp_path / "late")


def test_off_policy_losses_do_not_depend_on_the_prefetch(unserved_world, paced, tmp_path):
    with paced() as url:
        for steps in (0, 3):
            options = {"lmbda": 0, "teacher_prefetch_steps": steps}
            assert main(words(unserved_world, url, tmp_path / str(steps), **options)) == 0
    assert_same_to_the_last_bit(tmp_path / "0", tmp_path / "3")


def test_staleness_is_logged_and_changes_what_is_learned(unserved_world, paced, tmp_path):
    with paced() as url:
        for staleness in (0, 1):
            options = {"lmbda": 1, "rollout_staleness": staleness}
            assert main(words(unserved_world, url, tmp_path / str(staleness), **options)) == 0
    assert [entry["train/staleness"] for entry in log(tmp_path / "0")] == [0] * 8
    assert [entry["train/staleness"] for entry in log(tmp_path / "1")] == [0, *[1] * 7]
    assert [entry["train/staleness_max"] for entry in log(tmp_path / "1")] == [0, *[1] * 7]
    losses = [[entry["train/loss"] for entry in log(tmp_path / name)] for name in ("0", "1")]
    assert losses[0][0] == losses[1][0]  # the first step's weights are the same
    assert losses[0][1] != losses[1][1]


@pytest.mark.parametrize(
    ("method", "staleness"),
    [
        ({"lmbda": 1}, 1), ({"lmbda": 1}, 2), ({"lmbda": 0.5}, 2),
        ({"lmbda": 0.5, "request_student_top_m": 3}, 1),
    ],
)  # fmt: skip
def test_a_resumed_run_goes_on_with_what_was_begun_ahead(
    unserved_world, paced, tmp_path, method, staleness
):
    plain = {
        **method, "rollout_staleness": staleness, "save_strategy": "steps", "save_steps": 5,
    }  # fmt: skip
    output = tmp_path / "parts"
    with paced(1) as url:
        assert main(words(unserved_world, url, output, **plain)) == 0
        shutil.copytree(output, tmp_path / "whole")
        shutil.rmtree(output / "checkpoint-8")
        (output / "model.safetensors").unlink()
        assert (output / "checkpoint-5" / "ahead-0.npz").exists()
        again = words(unserved_world, url, output, **plain, resume_from_checkpoint="true")
        assert main(again) == 0
    assert_same_to_the_last_bit(tmp_path / "whole", output)


def test_the_trace_shows_what_went_on_when(unserved_world, paced, tmp_path):
    with paced(1) as url:
        options = {"lmbda": 1, "max_steps": 4, "trace_steps": "2-3"}
        assert main(words(unserved_world, url, tmp_path, **options)) == 0
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    complete = [event for event in events if event["ph"] == "X"]
    counts = Counter(event["name"] for event in complete)
    requests = [event["args"] for event in complete if event["name"] == "request"]
    assert sum(request["sequences"] for request in requests) == 2 * 8  # how many at once is chance
    del counts["request"], counts["waiting for the teacher"]
    assert counts == {
        "step": 2, "syncing": 2, "generating": 2, "forward and backward": 8, "optimizer": 2,
    }  # fmt: skip
    waits = [e for e in events if e["name"] == "waiting for the teacher" and e["ph"] == "X"]
    steps = [e for e in events if e["name"] == "step"]
    entries = log(tmp_path)[1:3]
    assert sum(e["dur"] for e in waits) * 1e-6 == pytest.approx(
        sum(entry["time/teacher"] for entry in entries), abs=0.01
    )
    assert sum(e["dur"] for e in steps) * 1e-6 == pytest.approx(
        sum(entry["time/step"] for entry in entries), abs=0.01
    )

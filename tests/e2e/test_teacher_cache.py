"""Training from stored answers: a real server fills the store, and is gone afterwards."""

import os
from dataclasses import replace

import pytest

from student_trainer.commands.main import main
from tests.e2e.test_distillation import assert_same_weights, flags, history
from tests.support.cache import corrupt_one_record, database
from tests.support.server import running_server

METHODS = {"supervised KD": {}, "SeqKD": {"seq_kd": "true"}}


def run(world, output, cache, command="distill", **options):
    options = {
        "teacher_url": world.url, "top_k_logprobs": 16, "lmbda": 0, "num_train_epochs": 2,
        "teacher_cache": cache, "teacher_timeout": 60, **options,
    }  # fmt: skip
    return main([command, *flags(world, output, **options)])


def logged(output, name):
    return [entry[name] for entry in history(output) if name in entry]


@pytest.mark.parametrize("method", METHODS)
def test_two_epochs_repeat_to_the_last_bit_without_a_teacher(unserved_world, tmp_path, method):
    cache, options = tmp_path / "cache", METHODS[method]
    with running_server(unserved_world.teacher) as url:
        world = replace(unserved_world, url=url)
        assert run(world, tmp_path / "served", cache, **options) == 0
    hits = logged(tmp_path / "served", "teacher/cache_hits")
    assert hits[0] == 0
    assert hits[-1] == 1  # the second epoch

    assert run(world, tmp_path / "alone", cache, **options) == 0
    assert set(logged(tmp_path / "alone", "teacher/cache_hits")) == {1.0}
    assert len(logged(tmp_path / "alone", "train/loss")) == 12
    assert logged(tmp_path / "alone", "train/loss") == logged(tmp_path / "served", "train/loss")
    assert_same_weights(tmp_path / "alone", tmp_path / "served", tolerance=0)


def test_a_run_without_its_answers_says_how_many_are_missing_and_what_to_do(
    unserved_world, tmp_path, capsys
):
    cache = tmp_path / "cache"
    with running_server(unserved_world.teacher) as url:
        world = replace(unserved_world, url=url)
        assert run(world, tmp_path / "part", cache, max_steps=2) == 0
        corrupted = tmp_path / "corrupted"
        assert run(world, tmp_path / "a", corrupted, max_steps=2) == 0
        corrupt_one_record(corrupted)
        assert run(world, tmp_path / "b", corrupted, max_steps=2) == 0
        file = database(corrupted)
        os.truncate(file, file.stat().st_size // 2)
        assert run(world, tmp_path / "c", corrupted, max_steps=2) == 0
    assert sum(logged(tmp_path / "b", "teacher/cache_corrupt")) == 1
    assert logged(tmp_path / "c", "train/loss") == pytest.approx(
        logged(tmp_path / "a", "train/loss"), rel=1e-5
    )
    assert logged(tmp_path / "b", "train/loss") == pytest.approx(
        logged(tmp_path / "a", "train/loss"), rel=1e-5
    )

    assert run(world, tmp_path / "again", cache, max_steps=2) == 0  # what it needs is there
    capsys.readouterr()
    assert run(world, tmp_path / "more", cache, teacher_timeout=3) == 1
    error = capsys.readouterr().err
    assert "32 of 48 answers that this run needs are missing in --teacher_cache" in error
    assert "`student-trainer precompute` with the same flags fills the cache" in error
    assert run(world, tmp_path / "on-policy", cache, lmbda=1, max_steps=1, teacher_timeout=3) == 1
    assert "Start it with" in capsys.readouterr().err


@pytest.mark.parametrize("method", METHODS)
def test_precompute_fills_the_cache_for_training_and_evaluation(unserved_world, tmp_path, method):
    cache = tmp_path / "cache"
    options = {
        "eval_dataset_name": unserved_world.held_out, "eval_strategy": "epoch", **METHODS[method]
    }  # fmt: skip
    with running_server(unserved_world.teacher) as url:
        world = replace(unserved_world, url=url)
        assert run(world, tmp_path / "x", cache, "precompute", **options) == 0
    assert not (tmp_path / "x").exists()  # nothing was trained
    assert run(world, tmp_path / "x", cache, "precompute", **options) == 0  # it is all there
    assert run(world, tmp_path / "alone", cache, **options) == 0
    assert set(logged(tmp_path / "alone", "teacher/cache_hits")) == {1.0}
    assert len(logged(tmp_path / "alone", "eval/divergence")) == 2


def test_what_cannot_work_is_refused(world, tmp_path, capsys):
    for command, options, message in (
        ("precompute", {"lmbda": 1}, "there is nothing to precompute"),
        ("precompute", {"request_student_top_m": 4}, "depend on the student's weights"),
        ("distill", {"teacher_cache_max_gb": 0}, "--teacher_cache_max_gb 0.0 must be above 0"),
        ("distill", {"accept_teacher_change": "true"}, "--accept_teacher_change"),
        ("distill", {"teacher_protocol": "vllm"}, "a stock vLLM does not"),
    ):
        assert run(world, tmp_path / "out", tmp_path / "cache", command, **options) == 2
        assert message in capsys.readouterr().err
    without = ["--teacher_url", world.url, "--lmbda", "0"]
    base = flags(world, tmp_path / "out")
    assert main(["precompute", *base, *without]) == 2
    assert "--teacher_cache is missing" in capsys.readouterr().err
    assert main(["distill", *base, *without, "--teacher_cache_max_gb", "2"]) == 2
    assert "no effect without --teacher_cache" in capsys.readouterr().err

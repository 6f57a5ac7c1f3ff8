"""The servers of a cell's teachers: which are started, and what the trainer is told."""

import json

import httpx
import pytest
from peft import LoraConfig, get_peft_model

from student_trainer.study.plan import Job
from student_trainer.study.runner import Runner
from student_trainer.study.served import servers_for
from student_trainer.study.spec import Cell
from tests.support.models import save_model, save_tokenizer
from tests.support.reference import load_model


def adapter(folder, base="base"):
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    return folder


def test_models_have_a_server_each(tmp_path):
    servers = servers_for([("x", tmp_path / "a"), ("y", tmp_path / "b")])
    assert [(str(s.model), s.flags()) for s in servers] == [
        (str(tmp_path / "a"), []),
        (str(tmp_path / "b"), []),
    ]
    assert [s.addresses("http://h:1") for s in servers] == [["x=http://h:1"], ["y=http://h:1"]]


def test_a_single_model_needs_no_name(tmp_path):
    (server,) = servers_for([("", tmp_path / "a")])
    assert server.addresses("http://h:1") == ["http://h:1"]


def test_adapters_of_one_base_share_a_server(tmp_path):
    one, two = adapter(tmp_path / "one"), adapter(tmp_path / "two")
    other = adapter(tmp_path / "three", "other")
    servers = servers_for([("x", one), ("y", tmp_path / "a"), ("z", two), ("w", other)])
    assert [str(s.model) for s in servers] == ["base", str(tmp_path / "a"), "other"]
    assert servers[0].flags() == ["--lora-modules", f"x={one}", f"z={two}"]
    assert servers[0].addresses("http://h:1") == ["x=http://h:1", "z=http://h:1"]
    assert servers[2].flags() == ["--lora-modules", f"w={other}"]


def test_a_single_adapter_is_requested_by_the_name_of_its_folder(tmp_path):
    one = adapter(tmp_path / "one")
    (server,) = servers_for([("", one)])
    assert server.flags() == ["--lora-modules", f"one={one}"]
    assert server.addresses("http://h:1") == ["http://h:1#one"]


@pytest.fixture
def study(tmp_path):
    """A study's folder with a base and two adapters of it."""
    save_tokenizer(tmp_path / "base")
    save_model(tmp_path / "base")
    for name in ("math", "code"):
        config = LoraConfig(
            task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False
        )
        get_peft_model(load_model(tmp_path / "base"), config).save_pretrained(tmp_path / name)
    return tmp_path


def test_the_runner_serves_the_teachers_of_a_job_and_stops_them(study):
    said = []
    runner = Runner(study, ["--backend", "transformers"], said.append)
    job = Job(
        Cell("b", "distill", {}, "cells.b"), None, "b", (), (), (("m", "math"), ("c", "code")), ""
    )
    assert "--teacher_url m=http://TEACHER c=http://TEACHER " in runner.command(job)
    try:
        runner._keep_serving(job.teachers)
        first, second = runner._addresses
        assert (first[:2], second[:2]) == ("m=", "c=")
        assert first[2:] == second[2:]
        models = httpx.get(f"{first[2:]}/v1/info").json()["models"]
        assert [model["model"] for model in models][1:] == ["m", "c"]
        assert len(said) == 1
        runner._keep_serving(job.teachers)
        assert len(said) == 1  # the same teachers go on
    finally:
        runner._stop_serving()
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{first[2:]}/v1/info")

"""Adapters that travel to rollout servers alone; vLLM's own servers are in tests/e2e."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from shared.errors import RolloutServerError
from shared.vllm_adapters import ReceivedAdapters
from student_trainer.rollouts import RolloutServers, ServerOptions, adapters
from student_trainer.rollouts.adapters import StudentAdapters
from student_trainer.rollouts.drift import trainer_logprobs
from student_trainer.rollouts.weights import StudentWeights
from tests.support.stub_rollout_server import GENERATE, send_no_weights, stub_rollout_servers
from tests.unit.student_trainer.rollouts.test_rollout_servers_stub import (
    expected,
    write,
)

LOAD = "v1/load_lora_adapter"
PROMPT = [3, 10, 17, 24]


@pytest.fixture(autouse=True)
def without_weights(monkeypatch):
    send_no_weights(monkeypatch)


@pytest.fixture
def stubs():
    with stub_rollout_servers(2) as both:
        for stub in both:
            stub.lora_rank = 8
        yield both


def base():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50, hidden_size=8, intermediate_size=8, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=2,
        )
    )  # fmt: skip


def adapted(**options):
    settings = {"r": 2, "target_modules": "all-linear", "init_lora_weights": False, **options}
    return get_peft_model(base(), LoraConfig(**settings))


def opened(student, stubs):
    options = ServerOptions(tuple(stub.url for stub in stubs), "nccl", seconds=3.0)
    return RolloutServers(student, options, dtype="float32", longest=40)


def test_the_base_is_sent_once_and_then_only_adapters(stubs):
    student = adapted()
    with opened(student, stubs) as both:
        sizes, names = [], []
        for version in range(3):
            both.sync(version)
            assert write(both) == expected()
            sizes.append(both.sent_bytes)
            names.append(both.adapter)
            assert [list(stub.adapters) for stub in stubs] == [[both.adapter]] * 2
            assert {body["model"] for stub in stubs for body in stub.prompts} == set(names)
        folder = Path(stubs[0].adapters[both.adapter])
        assert [other.name for other in folder.parent.iterdir()] == [folder.name]
        assert len(set(names)) == 3
        assert sizes[1] == sizes[2] == sizes[0] - both._weights.size
    assert not folder.parent.exists()
    for stub in stubs:
        assert stub.paths.count("update_weights") == 1
        assert stub.paths.count(LOAD) == 3
        assert not stub.paused
        assert stub.adapters == {}


def test_what_travels_is_what_peft_loads(tmp_path, monkeypatch):
    monkeypatch.setattr(adapters, "_PART_BYTES", 100)
    student = adapted(
        rank_pattern={"q_proj": 4}, alpha_pattern={"layers.1.mlp.up_proj": 3}, use_rslora=True
    )
    with stub_rollout_servers(1) as [stub]:
        stub.lora_rank = 8
        with opened(student, [stub]) as one:
            one.sync(0)
            folder = stub.adapters[one.adapter]
            loaded = PeftModel.from_pretrained(base(), folder)
            assert json.loads((Path(folder) / "adapter_config.json").read_text())["r"] == 2
    assert torch.equal(trainer_logprobs(loaded, PROMPT), trainer_logprobs(student, PROMPT))


def test_the_base_that_travels_is_without_adapters():
    student = adapted()
    weights = StudentWeights(student, torch.float32)
    weights.merged = False
    plain = base().state_dict()
    for name, weight in weights:
        assert torch.equal(weight, plain[name])


@pytest.mark.parametrize(
    ("options", "obstacle"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"bias": "all"}, "bias 'all'"),
        ({"modules_to_save": ["norm"]}, "modules_to_save"),
        ({"target_modules": ["embed_tokens", "q_proj"]}, "embed_tokens is no linear layer"),
        ({}, None),
    ],
    ids=["dora", "bias", "modules", "embedding", "plain"],
)
def test_adapters_that_cannot_go_alone_say_why(options, obstacle):
    student = adapted(**options)
    found = StudentAdapters(student, StudentWeights(student, torch.float32), torch.float32)
    assert found.obstacle is None if obstacle is None else obstacle in found.obstacle


def test_a_base_that_is_trained_too_goes_whole():
    student = adapted()
    next(student.parameters()).requires_grad_(True)
    found = StudentAdapters(student, StudentWeights(student, torch.float32), torch.float32)
    assert "is trained too" in found.obstacle


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"lora_rank": None}, "without --enable-lora"),
        ({"lora_rank": 1}, "--max-lora-rank 1, below 2"),
        ({"answers": {f"/{LOAD}": (400, {"error": "unexpected modules"})}}, "unexpected modules"),
        ({"answers": {"/server_info?config_format=json": (404, {})}}, "answered 404"),
        ({"unused": ["model.visual.q_proj"]}, "has no model.visual.q_proj"),
    ],
    ids=["none", "rank", "refused", "silent", "ignored"],
)
def test_servers_that_do_not_load_them_get_merged_weights_each_time(stubs, caplog, change, why):
    vars(stubs[1]).update(change)
    with opened(adapted(), stubs) as both, caplog.at_level(logging.WARNING):
        for version in range(2):
            before = [stub.paths.count("update_weights") for stub in stubs]
            both.sync(version)
            assert both.adapter is None
            assert all(
                stub.paths.count("update_weights") > old
                for stub, old in zip(stubs, before, strict=True)
            )
            assert write(both) == expected()
            assert both._weights.merged
    [told] = [message for message in caplog.messages if "not adapters" in message]
    assert why in told
    assert not any(stub.paused for stub in stubs)


def test_a_server_that_was_started_again_gets_the_base_again(stubs):
    with opened(adapted(), stubs) as both:
        both.sync(0)
        stubs[1].version, stubs[1].adapters = "default", {}
        both.sync(1)
        assert write(both) == expected()
        assert [stub.paths.count("update_weights") for stub in stubs] == [2, 2]


def test_a_server_that_lost_its_adapter_is_passed_over(stubs):
    with opened(adapted(), stubs) as both:
        both.sync(0)
        stubs[0].adapters.clear()
        assert write(both) == expected()
        assert both.live == [stubs[1].url]


def test_a_transfer_that_is_cut_off_is_repeated_from_the_base(stubs):
    stubs[1].answers["/collective_rpc"] = (500, {"error": "disk full"})
    with opened(adapted(), stubs) as both:
        with pytest.raises(RolloutServerError, match=r"3 attempts.*disk full"):
            both.sync(0)
        stubs[1].answers.clear()
        both.sync(0)
        assert write(both) == expected()
    assert GENERATE not in stubs[0].paths


@pytest.mark.parametrize("name", ["../x", "a/b", "", "-x"])
def test_a_worker_writes_nowhere_else(name):
    worker = ReceivedAdapters()
    worker.receive_adapter(0, "")
    with pytest.raises(ValueError, match="is no name"):
        worker.write_adapter("run", name, "{}")
    with pytest.raises(ValueError, match="is no name"):
        worker.write_adapter(name, "1", "{}")
    worker.delete_adapters("run")


def test_a_part_that_does_not_follow_is_an_error():
    worker = ReceivedAdapters()
    with pytest.raises(ValueError, match="no adapter was received"):
        worker.write_adapter("run", "1", "{}")
    worker.receive_adapter(0, "AAAA")
    with pytest.raises(ValueError, match="at byte 4 does not follow"):
        worker.receive_adapter(4, "AAAA")

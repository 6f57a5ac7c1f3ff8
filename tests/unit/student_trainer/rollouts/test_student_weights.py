"""The weights that an engine gets, against those of a checkpoint of the same model."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from student_trainer.rollouts import weights
from student_trainer.rollouts.weights import StudentWeights

SMALL = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "moe_intermediate_size": 12}
MODELS = {
    "plain": ("llama", {}),
    "tied": ("qwen2", {"tie_word_embeddings": True}),
    "bias": ("qwen2", {"attention_bias": True}),
    "norms": ("qwen3", {}),
    "experts": ("qwen3_moe", {**EXPERTS, "num_experts_per_tok": 2, "tie_word_embeddings": False}),
    "named otherwise": ("mixtral", {**EXPERTS, "num_experts_per_tok": 2}),
}


def make(kind, folder):
    name, options = MODELS[kind]
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **{**SMALL, **options}))
    made.save_pretrained(folder)  # a model that is loaded knows how its checkpoint names weights
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def saved(model, folder):
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def check(model, expected, dtype=torch.float32):
    weights = StudentWeights(model, dtype)
    given = list(weights)
    told = [(shape.name, shape.dtype, shape.shape) for shape in weights.shapes()]
    assert told == [(name, weight.dtype, tuple(weight.shape)) for name, weight in given]
    assert len({name for name, _ in given}) == len(given)
    assert {name for name, _ in given} == set(expected)
    for name, weight in given:
        torch.testing.assert_close(weight, expected[name].to(dtype), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", MODELS)
def test_weights_have_names_shapes_and_values_of_a_checkpoint(kind, tmp_path):
    model = make(kind, tmp_path / "first")
    expected = saved(model, tmp_path / "second")
    if "experts" in kind or kind == "named otherwise":
        assert any(".experts.3." in name for name in expected)  # each expert by itself
    check(model, expected)
    check(model, expected, torch.bfloat16)


@pytest.mark.parametrize("kind", MODELS)
def test_adapters_are_added_as_merging_does(kind, tmp_path):
    model = make(kind, tmp_path / "first")
    targets = ["q_proj", "o_proj"]
    config = LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    adapted = get_peft_model(model, config)
    weights = StudentWeights(adapted, torch.float32)
    before = dict(weights)
    check(adapted, saved(adapted.merge_and_unload(), tmp_path / "merged"))
    assert not any("lora" in name or "base_layer" in name for name in before)


def test_weights_are_copies_and_follow_the_model(tmp_path):
    model = make("plain", tmp_path)
    weights = StudentWeights(model, torch.float32)
    name, first = next(iter(weights))
    with torch.no_grad():
        model.state_dict(keep_vars=True)[name].add_(1)
    torch.testing.assert_close(next(iter(weights))[1], first + 1)


def test_weights_of_one_layer_are_gathered_at_a_time(tmp_path):
    """So no rank holds a sharded model whole: at most a layer is alive besides what is outside."""
    weights = StudentWeights(make("plain", tmp_path), torch.float32)
    gathered = []
    whole = weights._whole

    def counted(key, value):
        gathered.append(key)
        return whole(key, value)

    weights._whole = counted
    for name, _ in weights:
        layers = {key.split(".")[2] for key in gathered if ".layers." in key}
        if ".layers." in name:
            assert max(map(int, layers)) == int(name.split(".")[2])


def test_what_zero_3_shards_is_gathered_by_deepspeed(monkeypatch):
    """In DeepSpeed `zero` is an attribute of the package, and no module of it."""
    deepspeed = ModuleType("deepspeed")
    deepspeed.zero = SimpleNamespace(GatheredParameters=list)
    monkeypatch.setitem(sys.modules, "deepspeed", deepspeed)
    monkeypatch.setattr(weights, "is_deepspeed_zero3_enabled", lambda: True)
    sharded, whole = torch.zeros(1), torch.zeros(1)
    sharded.ds_id = 0
    [found] = weights.gathered([sharded, whole])
    assert found is sharded

"""Adapters of ``--lora-modules`` are checked before the model loads."""

import json

import pytest
import torch
from safetensors.torch import save_file

from shared.errors import ConfigurationError
from shared.identity import adapter_fingerprint
from teacher_server.adapters import LoraModule, adapter_rank, adapter_targets, lora_modules

KEYS = (
    "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
    "base_model.model.model.layers.0.mlp.down_proj.lora_B.weight",
)


@pytest.fixture
def adapter(tmp_path):
    """Write an adapter's folder, and return it."""

    def write(name="math", keys=KEYS, **config):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        content = {"peft_type": "LORA", "r": 8, **config}
        (folder / "adapter_config.json").write_text(json.dumps(content))
        save_file({key: torch.ones(2, 2) for key in keys}, folder / "adapter_model.safetensors")
        return folder

    return write


def test_names_and_folders_are_read_as_vllm_writes_them(adapter):
    folder = adapter()
    asked = [f"math={folder}", json.dumps({"name": "code", "path": str(folder)})]
    assert lora_modules(asked, "base") == (
        LoraModule("math", str(folder)),
        LoraModule("code", str(folder)),
    )


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("math", "give NAME=DIR"),
        ("=DIR", "give NAME=DIR"),
        ("math=", "give NAME=DIR"),
        ('{"name": "math"}', "give name and path"),
        ("{name", "not JSON"),
        ('{"name": "a", "path": "b", "base_model_name": "other"}', "base_model_name is not 'base'"),
        ("math=/no/such/folder", "no such folder"),
        ("a\x1bb=/no/such/folder", "control character"),
    ],
)
def test_a_value_that_names_no_adapter_is_refused(value, message):
    with pytest.raises(ConfigurationError, match=message) as caught:
        lora_modules([value], "base")
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize("name", ["base", "math"])
def test_two_models_of_one_name_are_refused(adapter, name):
    folder = adapter()
    with pytest.raises(ConfigurationError, match=f"two models would be called {name}"):
        lora_modules([f"math={folder}", f"{name}={folder}"], "base")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "IA3"}, "is a IA3 adapter; only LORA is served"),
        ({"modules_to_save": ["lm_head"]}, r"has modules_to_save \['lm_head'\]"),
        ({"use_dora": True}, "has use_dora True"),
        ({"bias": "all"}, "has bias all"),
        ({"layer_replication": [[0, 2]]}, "has layer_replication"),
        ({"init_lora_weights": "pissa_niter_4"}, "has init_lora_weights pissa_niter_4"),
        ({"init_lora_weights": "olora"}, "has init_lora_weights olora"),
    ],
)
def test_an_adapter_that_cannot_share_a_model_is_refused_with_the_remedy(adapter, config, message):
    folder = adapter(**config)
    with pytest.raises(ConfigurationError, match=message) as caught:
        lora_modules([f"math={folder}"], "base")
    assert "student-trainer merge" in str(caught.value)


@pytest.mark.parametrize("start", [True, False, "gaussian", "eva"])
def test_an_adapter_that_leaves_the_base_as_it_is_may_begin_in_any_way(adapter, start):
    folder = adapter(init_lora_weights=start, bias="none", modules_to_save=None)
    assert lora_modules([f"math={folder}"], "base")


def test_a_damaged_or_incomplete_folder_is_refused(adapter):
    folder = adapter()
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(ConfigurationError, match="is damaged"):
        lora_modules([f"math={folder}"], "base")
    folder = adapter()
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(ConfigurationError, match=r"no adapter_model\.safetensors"):
        lora_modules([f"math={folder}"], "base")


@pytest.mark.parametrize(
    "config",
    [{"r": None}, {"r": 0}, {"r": "8"}, {"rank_pattern": {"q_proj": "x"}}, {"rank_pattern": [8]}],
    ids=["none", "zero", "text", "no number", "no mapping"],
)
def test_an_adapter_without_a_rank_is_refused(adapter, config):
    folder = adapter(**config)
    with pytest.raises(ConfigurationError, match=r"adapter_config\.json has no rank: r is"):
        lora_modules([f"math={folder}"], "base")


def test_the_largest_rank_and_the_changed_layers_are_read_from_the_files(adapter):
    module = LoraModule("math", str(adapter(rank_pattern={"q_proj": 24})))
    assert adapter_rank(module) == 24
    assert adapter_targets(module) == ["down_proj", "q_proj"]


def test_an_identity_depends_on_base_and_adapter(adapter):
    one, other = adapter("one"), adapter("other", keys=KEYS[:1])
    found = {adapter_fingerprint(base, path) for base in "ab" for path in (one, other)}
    assert len(found) == 4
    assert adapter_fingerprint("a", one) == adapter_fingerprint("a", one)

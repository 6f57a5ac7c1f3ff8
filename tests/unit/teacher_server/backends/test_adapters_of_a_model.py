"""LoRA adapters beside a transformers model: any name, and only those that fit the model whole."""

import numpy as np
import pytest
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from shared.errors import ConfigurationError
from shared.protocol import ScoreSequence
from teacher_server.backends.base import ScoreJob
from teacher_server.backends.transformers import TransformersBackend
from teacher_server.metrics import Metrics
from teacher_server.settings import Settings
from tests.support.models import STATEFUL, save_model, save_tokenizer
from tests.support.reference import dense_logprobs, largest_error, load_model


@pytest.fixture
def adapter(llama_folder, tmp_path):
    config = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, target_modules="all-linear")
    get_peft_model(load_model(llama_folder), config).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def serve(folder, *modules):
    settings = Settings(
        str(folder), served_model_name="base", lora_modules=modules, backend="transformers"
    )
    return TransformersBackend(settings, Metrics())


def test_an_adapter_may_have_any_name(llama_folder, adapter):
    names = ["qwen2.5-math", "keys", "__base__", "lora"]
    served = serve(llama_folder, *(f"{name}={adapter}" for name in names))
    assert [one.model for one in served.facts.adapters] == names
    merged = PeftModel.from_pretrained(load_model(llama_folder), adapter).merge_and_unload().eval()
    ids = np.arange(4, 24, dtype=np.uint32)
    jobs = [ScoreJob(ids, 5, top_k=20, adapter=name) for name in [None, *names]]
    sequence = ScoreSequence(token_ids=ids, completion_start=5)
    for job, scores in zip(jobs, served.score_batch(jobs), strict=True):
        model = load_model(llama_folder) if job.adapter is None else merged
        assert largest_error(scores, dense_logprobs(model, ids, 5, 1.0), sequence) < 1e-5


@pytest.mark.parametrize("place", [0, 1], ids=["first", "second"])
def test_an_adapter_whose_weights_belong_to_no_layer_is_refused(llama_folder, adapter, place):
    """As of a model with a vision tower, whose layers have another prefix."""
    other = adapter.with_name("other")
    other.mkdir()
    (other / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text())
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file(
        {k.replace(".layers.", ".language_model.layers."): v for k, v in weights.items()},
        other / "adapter_model.safetensors",
    )
    modules = [f"math={adapter}"]
    modules.insert(place, f"other={other}")
    with pytest.raises(ConfigurationError, match=r"other=.*weights are missing or belong to no"):
        serve(llama_folder, *modules)


def test_an_adapter_of_an_output_layer_of_any_name_is_refused(tmp_path):
    save_tokenizer(tmp_path)
    save_model(tmp_path, family="rwkv", **STATEFUL["rwkv"])
    config = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, target_modules=["head"])
    folder = tmp_path / "adapter"
    get_peft_model(load_model(tmp_path), config).save_pretrained(folder)
    with pytest.raises(ConfigurationError, match=r"math=.* changes the output layer"):
        serve(tmp_path, f"math={folder}")

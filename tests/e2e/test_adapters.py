"""A run with LoRA leaves adapters: to evaluate, to merge, to serve, to train on."""

import pytest
import torch
from peft import AutoPeftModelForCausalLM

from student_trainer.commands.main import main
from student_trainer.config.arguments import ModelArguments
from student_trainer.model.load import load_model
from tests.e2e.test_distillation import distill, flags
from tests.support.models import save_model, save_tokenizer
from tests.support.reference import load_model as load_plainly


@pytest.fixture(scope="module")
def adapters(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    lora = {"use_peft": "true", "lora_r": 4, "learning_rate": 0.02}
    assert main(["sft", *flags(world, folder, max_steps=5, **lora)]) == 0
    return folder


def logits(model):
    # In double precision: merging rounds the weights, and the sums of a forward pass add to that.
    with torch.no_grad():
        return model.double().eval()(torch.arange(20)[None]).logits


def test_a_folder_of_adapters_loads_as_the_adapted_model(world, adapters):
    expected = logits(AutoPeftModelForCausalLM.from_pretrained(adapters))
    ours = logits(load_model(ModelArguments(str(adapters))))
    assert torch.allclose(ours, expected, atol=1e-5)
    assert not torch.allclose(ours, logits(load_plainly(world.student)), atol=1e-2)


def test_merged_adapters_are_a_plain_model_with_its_tokenizer(adapters, tmp_path):
    merged = tmp_path / "merged"
    words = [f"--model_name_or_path={adapters}", f"--output_dir={merged}"]
    assert main(["merge", *words]) == 0
    expected = logits(AutoPeftModelForCausalLM.from_pretrained(adapters))
    assert torch.allclose(logits(load_plainly(merged)), expected, atol=1e-5)
    assert (merged / "tokenizer.json").exists()
    assert not (merged / "adapter_config.json").exists()
    assert main(["merge", *words]) == 2  # never over what is there


def test_adapters_are_evaluated_and_distilled_further(world, adapters, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "checker": {"kind": "exact_match", "answer": "b"}}\n')
    words = [f"--model_name_or_path={adapters}", f"--dataset_name={rows}", "--max_new_tokens=4"]
    assert main(["evaluate", *words, f"--output_dir={tmp_path / 'scores'}"]) == 0
    assert distill(world, tmp_path / "out", model_name_or_path=adapters, lmbda=1) == 0
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_an_incomplete_checkpoint_is_refused(world, tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    save_tokenizer(tmp_path)
    save_model(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert distill(world, tmp_path / "out", model_name_or_path=tmp_path) == 2
    assert "lacks 1 weights of LlamaForCausalLM" in capsys.readouterr().err

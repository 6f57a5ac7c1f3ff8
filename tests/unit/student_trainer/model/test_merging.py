"""Adapters on weights that a model ties: what is merged, saved and sent is what was trained."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model

from shared.errors import ConfigurationError
from student_trainer.commands.main import main
from student_trainer.config.arguments import ModelArguments
from student_trainer.model import merging
from student_trainer.model.load import load_model
from student_trainer.rollouts.weights import StudentWeights
from tests.support.models import save_model, save_tokenizer
from tests.support.reference import load_model as load_plainly

IDS = torch.arange(20)[None]


def adapters_on(tmp_path, family, targets, **options):
    base, folder = tmp_path / "base", tmp_path / "adapters"
    save_tokenizer(base)
    save_model(base, family=family, tie_word_embeddings=True)
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM", **options)
    model = get_peft_model(load_plainly(base), config)
    for value in model.parameters():
        if value.requires_grad:  # far from the base
            value.data += 0.3 * torch.randn_like(value)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return model.eval(), folder


def logits(model):
    with torch.no_grad():
        return model.float().eval()(IDS).logits


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
@pytest.mark.parametrize(
    ("targets", "options"),
    [
        (["lm_head"], {}),
        (["embed_tokens"], {}),
        (["q_proj", "lm_head", "embed_tokens"], {}),
        (".*lm_head", {}),
        (["q_proj"], {"modules_to_save": ["lm_head"]}),
    ],
)
def test_adapters_on_tied_weights_are_merged_as_trained(tmp_path, family, targets, options):
    adapted, folder = adapters_on(tmp_path, family, targets, **options)
    expected = logits(adapted)
    assert torch.allclose(logits(load_model(ModelArguments(str(folder)))), expected, atol=1e-3)
    merged = tmp_path / "merged"
    assert main(["merge", f"--model_name_or_path={folder}", f"--output_dir={merged}"]) == 0
    assert torch.allclose(logits(load_plainly(merged)), expected, atol=1e-3)
    assert json.loads((merged / "config.json").read_text())["tie_word_embeddings"] is False


def test_adapters_elsewhere_leave_the_weights_tied(tmp_path):
    _, folder = adapters_on(tmp_path, "llama", ["q_proj"])
    assert load_model(ModelArguments(str(folder))).config.tie_word_embeddings is True


@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens"]])
def test_an_engine_elsewhere_is_sent_both_weights(tmp_path, targets):
    adapted, folder = adapters_on(tmp_path, "llama", targets)
    weights = dict(StudentWeights(adapted, torch.float32))
    merged = load_model(ModelArguments(str(folder))).state_dict()
    assert set(weights) == set(merged)
    for name, value in weights.items():
        torch.testing.assert_close(value, merged[name], msg=name)


def test_a_merge_that_changes_the_model_is_an_error(tmp_path, monkeypatch):
    adapted, _ = adapters_on(tmp_path, "llama", ["lm_head"])
    monkeypatch.setattr(merging, "adapts_tied_weights", lambda model: False)
    with pytest.raises(ConfigurationError, match="changed the model"):
        merging.merge_adapters(adapted)


def test_adapters_on_adapters_are_refused(tmp_path, capsys):
    _, folder = adapters_on(tmp_path, "llama", ["q_proj"])
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n')
    code = main([
        "sft", f"--model_name_or_path={folder}", f"--dataset_name={rows}", "--use_peft=true",
        f"--output_dir={tmp_path / 'out'}", "--report_to=none",
    ])  # fmt: skip
    assert code == 2
    assert "student-trainer merge" in capsys.readouterr().err


def test_adapters_whose_files_are_damaged_are_one_line(tmp_path):
    _, folder = adapters_on(tmp_path, "llama", ["q_proj"])
    (folder / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(ConfigurationError, match=f"{folder}: the adapters do not load: .*header"):
        load_model(ModelArguments(str(folder)))

"""Students made of a published model's own layers."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.real_models import kept_layers, prune
from shared.identity import tokenizer_identity
from tests.support.real import model_folder


@pytest.mark.parametrize(
    ("name", "kept", "kinds"),
    [
        ("gemma-3-270m", [0, 3, 7, 10, 14, 17], ["sliding"] * 5 + ["full"]),
        ("qwen2.5-coder-0.5b", [0, 2, 4, 6, 8, 10, 13, 15, 17, 19, 21, 23], ["full"] * 12),
    ],
)
def test_a_student_has_its_teachers_layers_and_tokenizer(name, kept, kinds, tmp_path):
    teacher = model_folder(name)
    student = tmp_path / "student"
    assert prune(teacher, student, len(kept), "bfloat16") == kept
    config = json.loads((student / "config.json").read_text())
    assert config["num_hidden_layers"] == len(kept)
    assert config["layer_types"] == [f"{kind}_attention" for kind in kinds]

    weights, whole = (load_file(folder / "model.safetensors") for folder in (student, teacher))
    for name, value in weights.items():
        source = name
        if ".layers." in name:
            before, _, rest = name.partition(".layers.")
            number, _, rest = rest.partition(".")
            source = f"{before}.layers.{kept[int(number)]}.{rest}"
        assert torch.equal(value, whole[source].to(torch.bfloat16)), name
    ours, theirs = (AutoTokenizer.from_pretrained(folder) for folder in (student, teacher))
    assert tokenizer_identity(ours) == tokenizer_identity(theirs)

    model = AutoModelForCausalLM.from_pretrained(student, dtype="bfloat16")
    logits = model(input_ids=torch.arange(8)[None]).logits
    assert logits.shape == (1, 8, config["vocab_size"])
    assert logits.isfinite().all()


def test_layers_are_evenly_spaced_and_a_folder_is_not_written_over(tmp_path):
    assert kept_layers(24, 24) == list(range(24))
    assert kept_layers(18, 2) == [0, 17]
    with pytest.raises(ValueError, match="--layers 25: the model has 24; keep 2 to 24"):
        kept_layers(24, 25)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="has files already"):
        prune(tmp_path, tmp_path, 2)

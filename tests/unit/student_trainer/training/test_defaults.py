"""Defaults that depend on the machine are settled once, and a run that goes on keeps them."""

import json

import pytest
import torch

from student_trainer.config.arguments import (
    AdapterArguments,
    DataArguments,
    DatasetArguments,
    GenerationArguments,
    ModelArguments,
    Recipe,
)
from student_trainer.config.training_arguments import SFTArguments
from student_trainer.training.defaults import settle
from student_trainer.training.inputs import FILE


def settled(tmp_path, *, dtype="auto", r=16, alpha=None, **options):
    recipe = Recipe(
        ModelArguments("m", torch_dtype=dtype), AdapterArguments(lora_r=r, lora_alpha=alpha),
        DatasetArguments(), DataArguments(), GenerationArguments(),
    )  # fmt: skip
    args = SFTArguments(output_dir=str(tmp_path), report_to="none", **options)
    return settle(recipe, args)


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    # So that transformers' own arguments do not look for it.
    monkeypatch.setattr(SFTArguments, "use_cpu", False, raising=False)
    monkeypatch.setattr(SFTArguments, "__post_init__", lambda self: None)


def test_the_usual_dtype_of_a_cpu_is_float32(tmp_path):
    assert settled(tmp_path).model.torch_dtype == "float32"
    assert settled(tmp_path, dtype="checkpoint").model.torch_dtype == "checkpoint"


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({}, "bfloat16"),
        ({"bf16": True}, "float32"),
        ({"fp16": True}, "float32"),
        ({"use_cpu": True}, "float32"),
        ({"dtype": "float32"}, "float32"),
        ({"dtype": "float16", "bf16": True}, "float16"),
    ],
)
def test_a_gpu_trains_in_bfloat16_unless_precision_is_mixed(tmp_path, gpu, options, dtype):
    assert settled(tmp_path, **options).model.torch_dtype == dtype


@pytest.mark.parametrize(
    ("kept", "given", "dtype"),
    [
        ("float32", "auto", "float32"),
        ("float16", "auto", "float16"),
        ("auto", "auto", "checkpoint"),  # what it meant when that was written
        ("float32", "bfloat16", "bfloat16"),  # `check_resumed` says so
    ],
)
def test_a_resumed_run_keeps_its_dtype(tmp_path, gpu, kept, given, dtype):
    checkpoint = tmp_path / "checkpoint-3"
    checkpoint.mkdir()
    (checkpoint / "trainer_state.json").write_text("{}")
    (checkpoint / FILE).write_text(json.dumps({"same": {}, "told": {"--torch_dtype": kept}}))
    found = settled(tmp_path, dtype=given, resume_from_checkpoint="auto")
    assert found.model.torch_dtype == dtype


@pytest.mark.parametrize(("r", "alpha", "expected"), [(16, None, 32), (8, None, 16), (8, 4, 4)])
def test_another_rank_keeps_the_scale(tmp_path, r, alpha, expected):
    assert settled(tmp_path, r=r, alpha=alpha).adapters.lora_alpha == expected

"""Packed rows against padded ones: the same loss, gradients and proposals, or none at all."""

import logging

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from shared.errors import ConfigurationError
from student_trainer.data.collate import model_inputs, predicting_positions
from student_trainer.data.sample import Sample
from student_trainer.losses import Divergence
from student_trainer.model.forward import SparseTargets, install_sparse_loss
from student_trainer.model.packing import decide_packing
from student_trainer.model.top_tokens import TopTokenProposals
from tests.support.losses import top_k
from tests.unit.student_trainer.model.test_head import (
    SHARED,
    assert_same,
    gradients,
    refusing,
    tiny,
)

# Windows shorter than the row, so that a wrong distance would show.
PACKED = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "gemma2": {"sliding_window": 4},
    "mistral": {"sliding_window": 4},
}
# Positions from the mask, convolutions along the row, and chunks counted along the row.
MIXED = {
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "llama4_text": {"attention_chunk_size": 8192, "head_dim": 8, "num_local_experts": 2},
}


def mixing(family):
    settings = {
        "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3,
        "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0, **MIXED[family],
    }  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings))


def sample(length, start):
    rng = np.random.default_rng(length)
    ids = rng.integers(2, SHARED, length).astype(np.uint32)
    return Sample(ids, start, rng.random(length - start) < 0.7, "dataset")


SAMPLES = [sample(9, 4), sample(5, 1), sample(12, 6)]


def loss(model, *, packed):
    rows = predicting_positions(SAMPLES, [s.completion_mask for s in SAMPLES], packed=packed)
    torch.manual_seed(2)
    teacher = top_k(2 * torch.randn(len(rows), SHARED, dtype=torch.float64), 6)
    targets = SparseTargets(rows, teacher, Divergence(), 7.0, SHARED)
    return model(**model_inputs(SAMPLES, 0, packed=packed), sparse_targets=targets)["loss"]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", PACKED)
def test_a_packed_row_gives_the_loss_and_gradients_of_padded_ones(family, attention):
    model = tiny(family, attn_implementation=attention, **PACKED[family]).float()
    install_sparse_loss(model)
    assert decide_packing(model, "on")
    padded, packed = loss(model, packed=False), loss(model, packed=True)
    assert packed.item() == pytest.approx(padded.item(), rel=1e-6)
    expected = gradients(padded, model)
    assert_same(gradients(packed, model), expected, tolerance=1e-5)
    model.gradient_checkpointing_enable()
    assert_same(gradients(loss(model, packed=True), model), expected, tolerance=1e-5)


def test_a_packed_row_holds_the_tokens_alone():
    inputs = model_inputs(SAMPLES, 0, packed=True)
    assert inputs["input_ids"].shape == (1, 26)
    assert inputs["position_ids"][0].tolist() == [*range(9), *range(5), *range(12)]


def test_proposals_are_the_same_packed_and_in_the_order_of_the_samples():
    model = tiny("llama")
    install_sparse_loss(model)
    padded, packed = (
        TopTokenProposals(
            model, count=3, vocab_size=SHARED, pad_token_id=0, batch_size=2, packed=packed
        )(SAMPLES)
        for packed in (False, True)
    )
    assert [ids.tolist() for ids in packed] == [ids.tolist() for ids in padded]
    assert [len(ids) for ids in packed] == [5, 4, 6]


@pytest.mark.parametrize("family", MIXED)
def test_a_model_that_mixes_packed_sequences_is_padded_or_refused(family, monkeypatch, caplog):
    model = mixing(family)
    with pytest.raises(ConfigurationError, match=f"--packing on: {type(model).__name__} does not"):
        decide_packing(model, "on")
    assert not decide_packing(model, "off")
    monkeypatch.setattr(
        "student_trainer.model.packing.is_flash_attention_requested", lambda _: True
    )
    with caplog.at_level(logging.WARNING):
        assert not decide_packing(model, "auto")
    assert "of padded ones: padding" in caplog.text


def test_auto_packs_for_flash_attention_alone(monkeypatch):
    model = tiny("llama")
    assert not decide_packing(model, "auto")
    assert decide_packing(model, "on")
    monkeypatch.setattr(
        "student_trainer.model.packing.is_flash_attention_requested", lambda _: True
    )
    assert decide_packing(model, "auto")
    assert model.training


def test_packing_is_tried_though_the_attention_does_not_run_yet(monkeypatch):
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "refusing", refusing)
    model = tiny("llama", attn_implementation="refusing")
    assert decide_packing(model, "on")
    assert model.config._attn_implementation == "refusing"

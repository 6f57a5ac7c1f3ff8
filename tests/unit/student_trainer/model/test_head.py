"""The fused loss of whole models against their own logits and the plain definition."""

import logging

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from student_trainer.config.arguments import AdapterArguments, ModelArguments
from student_trainer.losses import Divergence, sparse_generalized_jsd
from student_trainer.model.forward import PositionLogits, SparseTargets, install_sparse_loss
from student_trainer.model.head import OutputHead, find_head
from student_trainer.model.load import load_student
from tests.support.losses import BETAS, plain, top_k
from tests.support.models import save_model

VOCAB_SIZE, SHARED = 40, 36  # the last four rows of the output layer are padding
FAMILIES = {
    "llama": {},
    "llama with bias": {},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 8, "tie_word_embeddings": False},
    "gemma2": {"head_dim": 8, "final_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
    "mistral": {"head_dim": 8},
    "granite": {"logits_scaling": 4.0, "tie_word_embeddings": True},
    "cohere": {"logit_scale": 0.25},
}


def tiny(family, **options):
    """A random model in float64 whose logits are far from uniform."""
    settings = {
        "vocab_size": VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0, "initializer_range": 0.3,
        **FAMILIES[family], **options,
    }  # fmt: skip
    torch.manual_seed(0)
    config = AutoConfig.for_model(family.split()[0], **settings)
    model = AutoModelForCausalLM.from_config(config).double()
    if family.endswith("bias"):
        layer = nn.Linear(32, VOCAB_SIZE).double()
        layer.weight, layer.bias = (
            model.lm_head.weight,
            nn.Parameter(torch.randn(VOCAB_SIZE).double()),
        )
        model.lm_head = layer
    return model.train()


def batch(beta, temperature=1.0):
    """Return inputs of two sequences, one right-padded, and what a few of their rows must match."""
    torch.manual_seed(1)
    inputs = {
        "input_ids": torch.randint(SHARED, (2, 7)),
        "attention_mask": torch.tensor([[1] * 7, [1] * 5 + [0] * 2]),
    }
    rows = torch.tensor([2, 3, 5, 8, 10])
    teacher = top_k(2 * torch.randn(len(rows), SHARED, dtype=torch.float64), 6, temperature)
    targets = SparseTargets(rows, teacher, Divergence(beta, temperature), 4.0, SHARED)
    return inputs, targets


def expected_loss(model, inputs, targets):
    """The model's own logits, the plain definition, autograd."""
    logits = model(**inputs, use_cache=False).logits.flatten(0, 1)[targets.positions, :SHARED]
    rows = plain(logits.double(), targets.teacher, targets.divergence)
    return rows.sum() / targets.normalizer


def gradients(loss, model):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(actual, expected, tolerance=1e-9):
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(
            actual[name], gradient, rtol=0, atol=tolerance * float(gradient.abs().max()), msg=name
        )


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("family", FAMILIES)
def test_fused_loss_and_gradients_equal_those_of_the_models_own_logits(family, beta, caplog):
    model = tiny(family)
    inputs, targets = batch(beta, temperature=1.5)
    expected = expected_loss(model, inputs, targets)
    expected_gradients = gradients(expected, model)
    with caplog.at_level(logging.WARNING):
        install_sparse_loss(model)
    assert not caplog.records  # the fused way is taken
    model.lm_head.forward = None  # and the model's own logits are not
    loss = model(**inputs, sparse_targets=targets)["loss"]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
    assert_same(gradients(loss, model), expected_gradients)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_frozen_head_gets_no_weight_gradient_and_changes_no_other(family):
    model = tiny(family, tie_word_embeddings=False)
    inputs, targets = batch(0.5)
    expected = gradients(expected_loss(model, inputs, targets), model)
    del expected["lm_head.weight"]
    model.lm_head.requires_grad_(False)
    install_sparse_loss(model)
    loss = model(**inputs, sparse_targets=targets)["loss"]
    fused = loss.grad_fn
    assert fused.saved_tensors[1] is None
    assert_same(gradients(loss, model), expected)


@pytest.mark.parametrize("family", ["qwen2", "gemma2"])
def test_gradient_checkpointing_changes_nothing(family):
    model = tiny(family)
    inputs, targets = batch(0.5)
    expected = gradients(expected_loss(model, inputs, targets), model)
    install_sparse_loss(model)
    model.gradient_checkpointing_enable()
    assert_same(gradients(model(**inputs, sparse_targets=targets)["loss"], model), expected)


@pytest.mark.parametrize("whole", [True, False], ids=["whole model", "decoder"])
def test_a_compiled_model_gives_the_same(whole):
    model = tiny("gemma2")
    inputs, targets = batch(0.9)
    expected = gradients(expected_loss(model, inputs, targets), model)
    install_sparse_loss(model)
    if whole:
        compiled = torch.compile(model, backend="aot_eager")
    else:
        model.model.compile(backend="aot_eager")
        compiled = model
    assert_same(gradients(compiled(**inputs, sparse_targets=targets)["loss"], model), expected)


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere"])
def test_autocast_is_near_the_models_own_logits_under_autocast(family):
    model = tiny(family).float()
    inputs, targets = batch(0.5)
    exact = gradients(expected_loss(model, inputs, targets), model)
    with torch.autocast("cpu", torch.bfloat16):
        own = expected_loss(model, inputs, targets)
    install_sparse_loss(model)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**inputs, sparse_targets=targets)["loss"]
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(own.item(), rel=2e-2)
    gradient = gradients(loss, model)[
        "lm_head.weight" if family == "llama" else "model.norm.weight"
    ]
    other = exact["lm_head.weight" if family == "llama" else "model.norm.weight"]
    assert gradient.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(gradient.flatten(), other.flatten(), 0) > 0.995


def test_lora_on_the_head_uses_the_models_own_logits_and_trains_it(tmp_path, caplog):
    save_model(tmp_path, vocab_size=VOCAB_SIZE)
    model = load_student(
        ModelArguments(str(tmp_path)),
        AdapterArguments(use_peft=True, lora_target_modules=["lm_head", "q_proj"]),
    ).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    inputs, targets = batch(0.5)
    expected = expected_loss(model, inputs, targets)
    expected_gradients = gradients(expected, model)
    install_sparse_loss(model)
    assert "not a plain linear layer" in caplog.text
    loss = model(**inputs, sparse_targets=targets)["loss"]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
    actual = gradients(loss, model)
    assert any("lm_head.lora_A" in name for name in actual)
    assert_same(actual, expected_gradients)


class Halved(nn.Module):
    """Stands for a family whose forward does something unknown to its logits."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config = model, model.config

    def get_output_embeddings(self):
        return self.model.get_output_embeddings()

    def get_decoder(self):
        return self.model.get_decoder()

    def forward(self, **inputs):
        out = self.model(**inputs)
        out.logits = out.logits / 2
        return out


def test_an_unknown_head_is_told_by_trying_and_uses_the_models_own_logits(caplog):
    model = Halved(tiny("llama"))
    assert find_head(model, model.forward) is None
    assert "Halved does more to its logits" in caplog.text
    inputs, targets = batch(0.5)
    expected = expected_loss(model, inputs, targets)
    install_sparse_loss(model)
    loss = model(**inputs, sparse_targets=targets)["loss"]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
    assert model.training


def refusing(*args, **kwargs):
    """As flash attention does on a CPU, where weights that FSDP will shard still are."""
    raise NotImplementedError("not on this device")


def test_a_head_is_found_though_the_attention_does_not_run_yet(monkeypatch, caplog):
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "refusing", refusing)
    model = tiny("gemma2", attn_implementation="refusing")
    with pytest.raises(NotImplementedError):
        model(input_ids=torch.arange(3)[None])
    assert find_head(model, model.forward).softcap == 2.0
    assert not caplog.text
    assert model.config._attn_implementation == "refusing"


def test_a_head_that_cannot_be_tried_is_told_with_the_reason(monkeypatch, caplog):
    model = tiny("llama")
    monkeypatch.setattr(model.model, "forward", refusing)
    assert find_head(model, model.forward) is None
    assert "could not be tried (NotImplementedError: not on this device)" in caplog.text
    assert model.training


def test_without_targets_forward_is_the_models_own():
    model = tiny("llama").eval()
    inputs, _ = batch(0.5)
    before = model(**inputs).logits
    install_sparse_loss(model)
    assert torch.equal(model(**inputs).logits, before)


def test_statistics_are_those_of_the_rows():
    model = tiny("gemma2")
    inputs, targets = batch(0.5)
    logits = model(**inputs).logits.flatten(0, 1)[targets.positions, :SHARED]
    _, expected = sparse_generalized_jsd(logits, targets.teacher, Divergence())
    install_sparse_loss(model)
    statistics = model(**inputs, sparse_targets=targets)["statistics"]
    for name, column in vars(expected).items():
        torch.testing.assert_close(getattr(statistics, name), column, equal_nan=True, msg=name)


@pytest.mark.parametrize("trained", ["all", "lora on the head"])
@pytest.mark.parametrize("autocast", [False, True])
def test_logits_of_half_precision_are_float32_whichever_way_they_come(tmp_path, trained, autocast):
    """Also where only the model knows its logits; then too the loss sees what float64 would."""
    save_model(tmp_path, vocab_size=VOCAB_SIZE)
    adapters = {
        "all": AdapterArguments(),
        "lora on the head": AdapterArguments(use_peft=True, lora_target_modules=["lm_head"]),
    }[trained]
    dtype = "float32" if autocast else "bfloat16"
    model = load_student(ModelArguments(str(tmp_path), torch_dtype=dtype), adapters)
    seen = []
    head = model.get_output_embeddings()
    weight = head.weight
    decoder = getattr(model, "get_base_model", lambda: model)().get_decoder()
    decoder.register_forward_hook(lambda _, args, out: seen.append(out.last_hidden_state.detach()))
    install_sparse_loss(model)
    inputs, targets = batch(0.5)
    seen.clear()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = model(**inputs, position_logits=PositionLogits(targets.positions, SHARED))[
            "logits"
        ]
    hidden = seen[0].bfloat16().flatten(0, 1)[targets.positions].double()
    exact = hidden @ weight.detach().bfloat16().double().T
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), exact[:, :SHARED], rtol=1e-5, atol=1e-5)
    assert "forward" not in vars(head)  # no other call of the model is changed
    teacher = top_k(exact[:, :SHARED] + 0.03 * torch.randn(len(exact), SHARED).double(), 6)
    targets = SparseTargets(targets.positions, teacher, Divergence(), 1.0, SHARED)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(**inputs, sparse_targets=targets)["loss"]
    expected = sparse_generalized_jsd(exact[:, :SHARED], teacher, Divergence()).loss.sum()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-3)
    loss.backward()


@pytest.mark.parametrize("scale", [1.0, -0.25])
def test_proposed_tokens_are_ranked_in_float32(scale):
    """A thousand tokens within two steps of bfloat16 tie there, and the first would win."""
    torch.manual_seed(0)
    layer = nn.Linear(64, 1_000, bias=False).bfloat16()
    with torch.no_grad():
        layer.weight.copy_(torch.randn(64) + 0.05 * torch.randn(1_000, 64))
    hidden = torch.randn(6, 64).bfloat16()
    exact = scale * (hidden.double() @ layer.weight.double().T)
    ids = OutputHead(layer, scale, None).top_ids(hidden, 8, 1_000)
    assert torch.equal(ids, exact.topk(8).indices)

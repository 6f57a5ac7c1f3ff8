"""Gradients of output layer and embedding that are added to ``.grad``, against autograd's own."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from student_trainer.losses import Divergence, linear_sparse_jsd
from student_trainer.model.forward import SparseTargets, install_sparse_loss
from student_trainer.model.in_place import gradient_of
from tests.support.losses import top_k

VOCAB_SIZE, WIDTH = 40, 32


def tiny(family, tied):
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family, vocab_size=VOCAB_SIZE, hidden_size=WIDTH, intermediate_size=48,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        bos_token_id=None, eos_token_id=1, pad_token_id=0, initializer_range=0.3,
        tie_word_embeddings=tied,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).float().train()
    install_sparse_loss(model)
    return model


def micro_batches(in_place):
    torch.manual_seed(1)
    for _ in range(3):
        positions = torch.tensor([2, 3, 5, 8, 10])
        yield {
            "input_ids": torch.randint(8, (2, 7)),  # so that rows repeat
            "attention_mask": torch.tensor([[1] * 7, [1] * 5 + [0] * 2]),
            "sparse_targets": SparseTargets(
                positions, top_k(torch.randn(5, VOCAB_SIZE - 2), 6, 1.0), Divergence(0.5), 4.0,
                VOCAB_SIZE - 2, in_place=in_place,
            ),
        }  # fmt: skip


def step(model, in_place):
    losses = []
    for batch in micro_batches(in_place):
        loss = model(**batch)["loss"]
        loss.backward()
        losses.append(loss.item())
    return losses, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])  # Gemma scales its embedding
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "autocast"])
def test_gradients_equal_those_that_autograd_adds(family, tied, bf16):
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        losses, expected = step(tiny(family, tied), in_place=False)
        in_place, found = step(tiny(family, tied), in_place=True)
    assert in_place == losses
    for name, gradient in expected.items():
        assert not found[name].is_sparse
        # Under autocast a gradient that autograd adds was rounded to bfloat16 before.
        tolerance = (1e-2 if bf16 else 1e-6) * float(gradient.abs().max())
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=tolerance, msg=name)


class Matrices(TorchDispatchMode):
    """A count of the new dense tensors as large as the embedding."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in args if _dense(t)}
        given |= {t.untyped_storage().data_ptr() for t in (kwargs or {}).values() if _dense(t)}
        if _dense(result) and result.numel() == VOCAB_SIZE * WIDTH:
            self.count += result.untyped_storage().data_ptr() not in given
        return result


def _dense(value):
    return isinstance(value, torch.Tensor) and value.layout == torch.strided


@pytest.mark.parametrize("in_place", [True, False])
def test_a_later_micro_batch_makes_no_second_matrix_of_the_vocabulary(in_place):
    model = tiny("gemma3_text", tied=True)
    first, second, _ = micro_batches(in_place)
    with Matrices() as begun:
        model(**first)["loss"].backward()
    with Matrices() as added:
        model(**second)["loss"].backward()
    assert (begun.count, added.count) == ((1, 0) if in_place else (3, 3))


def test_without_gradients_nothing_is_added():
    model = tiny("llama", tied=True)
    with torch.no_grad():
        model(**next(micro_batches(True)))
    assert model.lm_head.weight.grad is None


def test_a_gradient_that_something_else_sees_is_left_to_autograd():
    weight = nn.Parameter(torch.randn(4, 3))
    assert gradient_of(weight) is weight.grad is not None
    assert gradient_of(weight.detach().requires_grad_()) is None
    assert gradient_of(nn.Parameter(weight.detach(), requires_grad=False)) is None
    assert gradient_of(nn.Parameter(weight.detach().bfloat16())) is None
    for register in ("register_hook", "register_post_accumulate_grad_hook"):
        hooked = nn.Parameter(weight.detach())
        getattr(hooked, register)(print)
        assert gradient_of(hooked) is None


def test_add_to_is_refused_where_it_would_be_wrong():
    batch = next(micro_batches(True))["sparse_targets"]
    hidden, weight = torch.randn(5, WIDTH, requires_grad=True), torch.randn(VOCAB_SIZE, WIDTH)
    weight.requires_grad_()
    given = (hidden, weight, batch.teacher, replace(batch.divergence))
    with pytest.raises(ValueError, match=r"add_to must be \[40, 32\] of torch.float32"):
        linear_sparse_jsd(*given, normalizer=1, add_to=torch.zeros(VOCAB_SIZE, 1))
    loss = linear_sparse_jsd(*given, normalizer=1, add_to=torch.zeros(VOCAB_SIZE, WIDTH)).loss
    with pytest.raises(RuntimeError, match=r"times 1, not times 2\.0"):
        (2 * loss).backward()

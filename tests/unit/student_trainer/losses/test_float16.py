"""`linear_sparse_jsd` in float16, whose smallest number is 6e-8: gradients must not fall below."""

import pytest
import torch

from student_trainer.losses import Divergence, linear_sparse_jsd
from tests.support.losses import BETAS, top_k

ROWS, WIDTH, VOCAB_SIZE = 64, 16, 2_000
NORMALIZER = 8_192  # completion tokens of an optimizer step
LOSS_SCALE = 65_536.0  # where a loss scaler starts


@pytest.mark.parametrize("under_autocast", [False, True])
@pytest.mark.parametrize("beta", BETAS)
def test_a_loss_scaler_keeps_float16_gradients_from_underflow(beta, under_autocast):
    torch.manual_seed(0)
    hidden, weight = torch.randn(ROWS, WIDTH).half(), torch.randn(VOCAB_SIZE, WIDTH).half() / 4
    teacher = top_k(3 * torch.randn(ROWS, VOCAB_SIZE), 8)

    def gradients(dtype, scale):
        inputs = [tensor.to(dtype).requires_grad_() for tensor in (hidden, weight)]
        with torch.autocast("cpu", torch.float16, enabled=under_autocast and scale != 1.0):
            loss = linear_sparse_jsd(*inputs, teacher, Divergence(beta), normalizer=NORMALIZER).loss
        scaled = torch.autograd.grad(loss * scale, inputs)
        return [gradient.float() / scale for gradient in scaled]

    exact = gradients(torch.float32, 1.0)
    half = gradients(torch.float32 if under_autocast else torch.float16, LOSS_SCALE)
    for one, other in zip(half, exact, strict=True):
        assert (one - other).norm() < 5e-3 * other.norm()


def test_an_upstream_gradient_of_one_still_divides_by_the_normalizer_in_float16():
    torch.manual_seed(0)
    hidden = torch.randn(4, WIDTH).half().requires_grad_()
    weight = torch.randn(50, WIDTH).half()
    teacher = top_k(3 * torch.randn(4, 50), 8)
    whole, quarter = (
        torch.autograd.grad(
            linear_sparse_jsd(hidden, weight, teacher, Divergence(), normalizer=normalizer).loss,
            hidden,
        )[0]
        for normalizer in (1, 4)
    )
    assert torch.equal(quarter, whole / 4)

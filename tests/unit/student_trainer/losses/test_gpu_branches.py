"""The fused loss as it runs on a GPU, on tensors that have shapes and no numbers.

Whatever reads a number of such a tensor fails, so what passes here waits for no device.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode

from student_trainer.losses import Divergence, HardLabels, SparseDistribution, fused, projection
from student_trainer.losses.fused import linear_sparse_jsd
from student_trainer.losses.projection import add_product

N, V, D, K = 12, 40, 8, 4


@pytest.fixture
def gpu(monkeypatch):
    """Fake tensors that say they are a GPU's; the checks of inputs, which wait once, are off."""
    monkeypatch.setattr(fused, "check_teacher", lambda *_: None)
    monkeypatch.setattr(fused, "check_weights", lambda *_: None)
    monkeypatch.setattr(FakeTensor, "is_cuda", True)
    with FakeTensorMode():
        yield


def step(dtype, *, bias=False, labelled=False, trained=True):
    """Compute loss and gradients in chunks of 5; return the inputs."""
    hidden, weight, offset = (torch.empty(shape, dtype=dtype) for shape in ((N, D), (V, D), (V,)))
    inputs = [hidden.requires_grad_(), weight.requires_grad_(trained), offset.requires_grad_()]
    teacher = SparseDistribution(
        torch.empty(N, K, dtype=torch.int64), torch.empty(N, K), torch.empty(N)
    )
    labels = HardLabels(torch.empty(N, dtype=torch.int64), torch.empty(N))
    linear_sparse_jsd(
        hidden, weight, teacher, Divergence(), normalizer=3, chunk_size=5, vocab_size=V - 3,
        bias=offset if bias else None, labels=labels if labelled else None, kernel="torch",
        weights=torch.empty(N) if labelled else None, softcap=30.0 if labelled else None,
    ).loss.backward()  # fmt: skip
    return inputs


def test_reading_a_number_fails_here(gpu):
    with pytest.raises(DataDependentOutputException):
        torch.empty(()).item()


@pytest.mark.parametrize("adds", [True, False], ids=["addmm", "some rows at a time"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("labelled", [False, True], ids=["plain", "labels, weights, softcap"])
def test_forward_and_backward_wait_for_no_device(gpu, monkeypatch, adds, dtype, bias, labelled):
    monkeypatch.setattr(projection, "adds_wide_products", lambda *_: adds)
    inputs = step(dtype, bias=bias, labelled=labelled)
    for one in inputs if bias else inputs[:2]:
        assert (one.grad.shape, one.grad.dtype) == (one.shape, dtype)
    assert (inputs[2].grad is not None) == bias


class Products(torch.utils._python_dispatch.TorchDispatchMode):
    """A record of the products of matrices: name, and dtype and size of the result."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        name = function.__name__
        if "mm" in name:
            self.seen.append((name.split(".")[0], found.dtype, tuple(found.shape)))
        return found


def test_the_weight_gradient_is_summed_in_float32_without_a_second_one(gpu, monkeypatch):
    """Three chunks: the first is written, the others are added where the sum is."""
    monkeypatch.setattr(projection, "adds_wide_products", lambda *_: True)
    with Products() as products:
        step(torch.bfloat16)
    of_weight = [one for one in products.seen if one[2] == (V - 3, D)]
    assert of_weight == [(name, torch.float32, (V - 3, D)) for name in ("mm", "addmm", "addmm")]


def test_a_frozen_output_layer_costs_two_products_a_chunk(gpu):
    with Products() as products:
        step(torch.bfloat16, trained=False)
    assert [shape for _, _, shape in products.seen] == [
        (5, V - 3), (5, D), (5, V - 3), (5, D), (2, V - 3), (2, D)
    ]  # fmt: skip


def test_an_older_torch_adds_some_rows_at_a_time(gpu, monkeypatch):
    monkeypatch.setattr(projection, "adds_wide_products", lambda *_: False)
    monkeypatch.setattr(projection, "CACHED_BYTES", 4 * D * 16)
    total = torch.empty(V, D)
    a, b = (torch.empty(shape, dtype=torch.bfloat16) for shape in ((V, N), (N, D)))
    with Products() as products:
        add_product(total, a, b, first=False)
    assert products.seen == [("mm", torch.float32, (rows, D)) for rows in (16, 16, 8)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_products_are_added_on_a_cpu(dtype):
    torch.manual_seed(0)
    parts = [(torch.randn(7, 5).to(dtype), torch.randn(5, 3).to(dtype)) for _ in range(3)]
    total = torch.full((7, 3), torch.nan, dtype=torch.promote_types(dtype, torch.float32))
    for place, (a, b) in enumerate(parts):
        add_product(total, a, b, first=place == 0)
    expected = sum(a.double() @ b.double() for a, b in parts)
    tolerance = 3e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(total.double(), expected, rtol=tolerance, atol=tolerance)

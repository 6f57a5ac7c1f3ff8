"""The short arithmetic of the study on real models, against the plain one on few tokens."""

import math

import pytest
import torch

from benchmarks import accuracy_vs_k
from benchmarks.accuracy_real import WAYS, compared

V = 90


def test_a_column_for_the_rest_gives_the_same_value_and_gradient():
    torch.manual_seed(0)
    student, teacher = 2 * torch.randn(2, 5, V, dtype=torch.float64)
    next_ids = torch.tensor([5, 0, 59, 5, 89])
    short = dict(compared(student, teacher, next_ids, (1, 16, 64)))
    case = accuracy_vs_k.Case("small", student, teacher, next_ids)
    tails = ("bucket", "renormalize")
    checked = 0
    for plain in accuracy_vs_k.study(case, (1, 16, 64), tuple(accuracy_vs_k.SUPPORTS), tails):
        if (plain.support, plain.tail) not in WAYS:
            continue
        key = (1.0, plain.beta, plain.support, plain.tail, plain.k)
        count, dense, norm, loss, product, square, p, q = short[key]
        checked += 1
        assert count == 5
        assert abs(loss - dense) / dense == pytest.approx(plain.relative_error, abs=1e-9)
        assert product / math.sqrt(square * norm) == pytest.approx(plain.gradient_cosine, abs=1e-9)
        assert math.sqrt(square / norm) == pytest.approx(plain.gradient_norm_ratio, rel=1e-9)
        assert (p / count, q / count) == pytest.approx((plain.teacher_mass, plain.student_mass))
    assert checked == 5 * 3 * len(WAYS)
    assert len(short) == 2 * checked  # at two temperatures

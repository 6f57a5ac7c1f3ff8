"""The short arithmetic of the study on real models, against the plain one on few tokens."""

import math

import pytest
import torch
from safetensors.torch import load_file

from benchmarks import accuracy_vs_k
from benchmarks.accuracy_real import WAYS, compared, heal
from benchmarks.real_texts import Text
from tests.support.models import save_model
from tests.support.reference import load_model

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


def test_healing_trains_the_layers_alone(tmp_path):
    save_model(tmp_path / "pruned")
    texts = [Text("arithmetic", [1, 2, 3], [4, 5, 6])] * 4
    teacher = load_model(tmp_path / "pruned")
    with torch.no_grad():
        teacher.lm_head.weight.mul_(3)
    heal(tmp_path / "pruned", tmp_path / "healed", teacher, texts, pad=0)
    before, after = (
        load_file(tmp_path / name / "model.safetensors") for name in ("pruned", "healed")
    )
    changed = {name for name, old in before.items() if not torch.equal(old.bfloat16(), after[name])}
    assert {name for name in changed if "embed" in name or "lm_head" in name} == set()
    assert any("layers.0" in name for name in changed)

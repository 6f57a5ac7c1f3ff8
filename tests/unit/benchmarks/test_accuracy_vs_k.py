"""The study's own arithmetic, on rows small enough to check."""

import xml.etree.ElementTree as ET

import pytest
import torch

from benchmarks.accuracy_vs_k import (
    BETAS,
    SAMPLED,
    STUDENT_TOP_M,
    SUPPORTS,
    Case,
    sampled,
    study,
    support_of,
    synthetic,
    truncated,
)
from student_trainer.losses import Divergence, generalized_jsd, sparse_generalized_jsd
from student_trainer.reporting.svg import write_chart

V = 60


@pytest.fixture
def case():
    torch.manual_seed(0)
    student, teacher = 2 * torch.randn(2, 3, V, dtype=torch.float64)
    return Case("small", student, teacher, torch.tensor([5, 0, 59]))


@pytest.mark.parametrize("support", SUPPORTS)
def test_supports_name_what_they_say_once_and_exactly(case, support):
    distribution = support_of(case, 4, support)
    log_p = case.teacher.log_softmax(-1)
    for row in range(3):
        wanted = set(case.teacher[row].topk(4).indices.tolist())
        if support != "top-k":
            wanted.add(int(case.next_ids[row]))
        if support == "requested":
            wanted |= set(case.student[row].topk(STUDENT_TOP_M).indices.tolist())
        named = [i for i in distribution.token_ids[row].tolist() if i >= 0]
        assert sorted(named) == sorted(wanted)
        total = log_p[row, named].exp().sum() + distribution.tail_logprob[row].exp()
        assert float(total) == pytest.approx(1.0, abs=1e-12)


def test_with_the_whole_vocabulary_every_tail_is_dense(case):
    every = study(case, (V,), ("top-k",), ("bucket", "renormalize", "truncate"))
    results = [result for result in every if result.support == "top-k"]
    assert len(results) == 15
    for result in results:
        assert result.relative_error < 1e-9
        assert result.gradient_cosine == pytest.approx(1.0, abs=1e-9)
        assert result.gradient_norm_ratio == pytest.approx(1.0, abs=1e-9)


def test_draws_give_the_dense_value_and_gradient_in_the_mean(case):
    logits = case.student.clone().requires_grad_()

    def value_and_gradient(rows):
        return torch.cat([rows.detach(), torch.autograd.grad(rows.sum(), logits)[0].flatten()])

    dense = value_and_gradient(generalized_jsd(logits, case.teacher, Divergence(0.0)))
    found = torch.stack(
        [
            value_and_gradient(
                sparse_generalized_jsd(logits, sampled(case, 8, seed), Divergence(0.0)).loss
            )
            for seed in range(1000)
        ]
    )
    spread = found.std(dim=0) + 1e-2  # tokens that were never drawn show none
    deviations = (found.mean(dim=0) - dense) / (spread / 1000**0.5)
    assert float(deviations.abs().max()) < 4.5  # of 183 numbers
    betas = [r.beta for r in study(case, (8,), ("top-k",), ("bucket",)) if r.support == SAMPLED]
    assert betas == [0.0]  # forward KL alone


@pytest.mark.parametrize("beta", BETAS)
def test_truncation_sums_the_definition_over_the_support_alone(case, beta):
    every = truncated(case.student, support_of(case, V, "top-k"), beta)
    dense = generalized_jsd(case.student, case.teacher, Divergence(beta))
    torch.testing.assert_close(every, dense)
    some = truncated(case.student, support_of(case, 4, "top-k"), beta)
    assert (some < dense).all()


def test_own_favourites_hold_half_of_the_students_mass():
    plain, own = (synthetic(2, own_favourites=count, vocab_size=5000) for count in (0, 8))
    assert torch.equal(plain.teacher, own.teacher)
    moved = plain.student != own.student
    held = (own.student.softmax(-1) * moved).sum(-1)
    assert ((held - 0.5).abs() < 0.05).all()


def test_naming_one_of_several_favourites_turns_the_gradient_yet_brings_it_nearer():
    """Reverse KL in numbers; docs/explanation/sparse-divergence.md quotes them."""
    tokens, favourites = 1000, slice(1, 5)
    p, q = torch.full((2, tokens), 0.1 / (tokens - 5), dtype=torch.float64)
    p[0], p[favourites] = 0.9 - 4e-6, 1e-6
    q[0], q[favourites] = 0.5, 0.1
    logits = q.log().repeat(tokens, 1).requires_grad_()  # a row for each next token
    case = Case("", logits.detach(), p.log().expand(tokens, -1), torch.arange(tokens))

    def gradient(divergence):
        return torch.autograd.grad(divergence.sum(), logits)[0]

    dense = gradient(generalized_jsd(logits, case.teacher, Divergence(1.0)))[0]
    unnamed, named = (
        gradient(sparse_generalized_jsd(logits, support_of(case, 1, support), Divergence(1.0)).loss)
        for support in ("top-k", "default")
    )

    def cosine_and_distance(one):
        distance = (one - dense).norm() / dense.norm()
        return [float(torch.cosine_similarity(one, dense, 0)), float(distance)]

    # Unnamed all four are pushed alike, much too weakly.
    assert cosine_and_distance(unnamed[0]) == pytest.approx([0.989, 0.795], abs=1e-3)
    assert unnamed[0, favourites].tolist() == pytest.approx([0.110] * 4, abs=1e-3)
    # One named takes the whole push: another direction, but not as far off.
    assert cosine_and_distance(named[1]) == pytest.approx([0.785, 0.682], abs=1e-3)
    assert named[1, favourites].tolist() == pytest.approx([1.010] + [-0.003] * 3, abs=1e-3)
    assert dense[favourites].tolist() == pytest.approx([0.720] * 4, abs=1e-3)
    # Each is named as often as it is sampled: the mean is nearer in both.
    assert cosine_and_distance(q @ named) == pytest.approx([0.995, 0.720], abs=1e-3)


def test_charts_are_svg_with_a_line_for_each_series(tmp_path):
    series = {"a < b": [(1, 0.5), (8, 1e-9)], "c": [(1, 0.1), (8, 0.01)]}
    write_chart(tmp_path / "chart.svg", "title", "k", series, floor=1e-6)
    root = ET.parse(tmp_path / "chart.svg").getroot()
    lines = root.findall("{http://www.w3.org/2000/svg}polyline")
    assert len(lines) == 2
    ends = [float(line.get("points").split()[-1].split(",")[1]) for line in lines]
    assert ends[0] == pytest.approx(320 - 40)  # what lies below the floor is drawn at it
    assert "a < b" in [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")]

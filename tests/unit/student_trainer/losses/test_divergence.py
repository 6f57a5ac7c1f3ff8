"""`Divergence`: one value from the flags to the kernels, and the losses' former parameters."""

from dataclasses import dataclass, fields, replace

import numpy as np
import pytest
import torch

from student_trainer.config.arguments import DivergenceFlags
from student_trainer.data.sample import Sample
from student_trainer.losses import (
    Divergence,
    LossOutput,
    closed_form,
    generalized_jsd,
    linear_sparse_jsd,
    sparse_generalized_jsd,
)
from student_trainer.model.forward import install_sparse_loss
from student_trainer.pipeline.method import DistillationConfig
from student_trainer.pipeline.targets import ScoredSample
from student_trainer.training.micro_batch import MicroBatchBuilder
from student_trainer.training.plan import TrainingPlan
from student_trainer.training.recipe import divergence_from_flags
from tests.support.losses import top_k
from tests.unit.student_trainer.model.test_head import SHARED, Halved, tiny


@dataclass(frozen=True)
class Extended(Divergence):
    """A divergence with an option that no code between the flags and the kernels knows."""

    margin: float = 0.0


@pytest.fixture
def received(monkeypatch):
    """The divergences that the closed form is given."""
    found = []
    compute = closed_form.divergence_and_gradient

    def recording(logits, teacher, divergence, **arguments):
        found.append(divergence)
        return compute(logits, teacher, divergence, **arguments)

    monkeypatch.setattr(closed_form, "divergence_and_gradient", recording)
    return found


@pytest.mark.parametrize("family", ["llama", "unknown"])
def test_a_new_option_goes_from_the_plan_to_the_closed_form_by_itself(family, received):
    """The rest to write for one: its field, its flag, and its mathematics in both kernels."""
    model = Halved(tiny("llama")) if family == "unknown" else tiny(family)
    install_sparse_loss(model)
    chosen = Extended(0.3, 2.0, "renormalize", margin=0.25)
    method = DistillationConfig(
        lmbda=0.0, seq_kd=False, seq_kd_temperature=0.0, divergence=chosen, top_k=1,
        max_new_tokens=4, seed=0, stop_ids=(1,),
    )  # fmt: skip
    builder = MicroBatchBuilder(TrainingPlan(method, SHARED), 0, packed=False)
    sample = Sample(np.arange(2, 8, dtype=np.uint32), 3, np.ones(3, bool), "dataset")
    scored = [ScoredSample(sample, None)]
    model(**builder.training(scored, 3.0))["loss"].backward()
    assert [one is chosen for one in received] == [True]
    model(**builder.held_out(scored))
    assert received[1:] == [replace(chosen, tail="bucket")]  # the option is kept
    assert received[1].margin == 0.25


def test_each_field_is_a_flag_of_its_name_and_default():
    defaults = {field.name: field.default for field in fields(Divergence)}
    assert {name: getattr(DivergenceFlags(), name) for name in defaults} == defaults
    flags = DivergenceFlags(beta=0.3, temperature=2.0, tail="renormalize")
    assert divergence_from_flags(flags) == Divergence(0.3, 2.0, "renormalize")


@pytest.mark.parametrize("loss", ["sparse", "linear", "dense"])
def test_the_former_parameters_still_work_and_tell_the_new_one(loss):
    torch.manual_seed(0)
    hidden, weight, logits = torch.randn(5, 4), torch.randn(9, 4), torch.randn(5, 9)
    teacher = top_k(torch.randn(5, 9), 3, 2.0)
    function, arguments, options = {
        "sparse": (sparse_generalized_jsd, (logits, teacher), {}),
        "linear": (linear_sparse_jsd, (hidden, weight, teacher), {"normalizer": 5}),
        "dense": (generalized_jsd, (logits, torch.randn(5, 9)), {}),
    }[loss]
    expected = function(*arguments, Divergence(0.3, 2.0), **options)
    message = rf"pass a Divergence to {function.__name__} .*Divergence\(beta=0\.3, temperature=2\.0"
    with pytest.warns(DeprecationWarning, match=message) as warned:
        found = function(*arguments, beta=0.3, temperature=2.0, **options)
    assert warned[0].filename == __file__
    assert torch.equal(found, expected if loss == "dense" else expected.loss)
    if loss != "dense":
        with pytest.warns(DeprecationWarning, match=message):
            found, statistics = function(
                *arguments, beta=0.3, temperature=2.0, return_statistics=True, **options
            )
        assert isinstance(expected, LossOutput)
        assert torch.equal(found, expected.loss)
        for name, column in vars(expected.statistics).items():
            torch.testing.assert_close(
                getattr(statistics, name), column, rtol=0, atol=0, equal_nan=True
            )
    with (
        pytest.warns(DeprecationWarning, match="pass a Divergence"),
        pytest.raises(TypeError, match="multiple values for argument 'divergence'"),
    ):
        function(*arguments, Divergence(0.3), beta=0.3, **options)
    with pytest.raises(TypeError, match="unexpected keyword argument 'temperature'"):
        function(*arguments, Divergence(0.3), temperature=2.0, **options)

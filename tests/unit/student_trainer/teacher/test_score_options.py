"""The options of a request for scores, and how a teacher was asked before there was this class."""

import pytest

from student_trainer.losses import Divergence
from student_trainer.pipeline.method import DistillationConfig
from student_trainer.teacher import Sampling, ScoreOptions
from student_trainer.teacher.deprecated import former_score_parameters

METHOD = DistillationConfig(
    lmbda=0.0, seq_kd=False, seq_kd_temperature=0.0,
    divergence=Divergence(beta=0.0, temperature=2.0),
    top_k=5, max_new_tokens=8, seed=3, stop_ids=(1,), sampled=True,
)  # fmt: skip


@former_score_parameters
def score(sequences, options, *, requested=None):
    return sequences, options, requested


def test_the_former_parameters_still_work_with_a_warning():
    with pytest.warns(DeprecationWarning, match=r"pass ScoreOptions to score .*top_k=4"):
        found = score([1], top_k=4, temperature=0.5, sample_seed=7, requested=[2])
    assert found == ([1], ScoreOptions(4, 0.5, 7), [2])


def test_options_are_handed_on_without_a_warning(recwarn):
    assert score([1], ScoreOptions(4)) == ([1], ScoreOptions(4, 1.0, None), None)
    assert not recwarn.list


def test_a_method_draws_anew_in_each_step_and_not_outside_of_steps():
    assert METHOD.scoring() == ScoreOptions(5, 2.0)
    assert METHOD.scoring(0) == METHOD.scoring(0) != METHOD.scoring(1)
    assert METHOD.scoring(0) == ScoreOptions(5, 2.0, METHOD.sample_seed(0))


def test_a_sampling_without_scores_has_no_options_of_them():
    sampling = Sampling(4, 0.0, seed=1, stop_token_ids=[], score_temperature=2.0)
    assert sampling.scoring is None
    assert METHOD.sampling(0.0).scoring == METHOD.scoring()

"""The divergence that its own prompt causes in a teacher, wherever held-out rows are scored."""

from types import SimpleNamespace

import numpy as np
import pytest

from shared.sparse import SparseLogprobs
from student_trainer.data.sample import Example, Sample
from student_trainer.losses import Divergence
from student_trainer.pipeline.method import DistillationConfig
from student_trainer.teacher.named import Teachers
from student_trainer.training.evaluation import HeldOutEvaluation
from tests.support.stub import info

HALVES = np.log(np.full((2, 1), 0.5, np.float32))  # [T, k]


class HalfSure:
    """A teacher that is half sure of token 3 behind its own prompt, and a quarter behind others."""

    connected, info = True, info()

    @property
    def live(self):
        return self

    def score(self, sequences, options, *, requested):
        assert options.sample_seed is None
        assert [ids.tolist() for ids in requested] == [[[3], [3]]]
        assert [(ids.tolist(), start) for ids, start in sequences] == [([1, 2, 3, 3], 2)]
        return [scores(HALVES - np.float32(np.log(2)))]


def scores(requested=None):
    return SparseLogprobs(
        token_ids=np.full((2, 1), 3, np.uint32),
        logprobs=HALVES,
        next_token_logprob=HALVES[:, 0],
        tail_logprob=np.full(2, -np.inf, np.float32),
        requested_logprobs=requested,
    )


@pytest.mark.parametrize("sampled", [False, True], ids=["top-k", "draws"])
def test_it_is_measured_whatever_support_is_learned(sampled):
    method = DistillationConfig(
        lmbda=0.0, seq_kd=False, seq_kd_temperature=1.0, divergence=Divergence(beta=0.0), top_k=1,
        max_new_tokens=4, seed=0, stop_ids=(1,), sampled=sampled,
    )  # fmt: skip
    sample = Sample(np.array([1, 2, 3, 3], np.uint32), 2, np.ones(2, bool), "dataset")
    plain = Example(0, "a", sample.prompt_ids, sample, None, "")
    seen = Example(
        1,
        "b",
        sample.prompt_ids,
        sample,
        None,
        "",
        teacher_prompt_ids=np.arange(9, dtype=np.uint32),
    )
    parts = dict.fromkeys(
        ("builder", "rollouts", "tokenizer", "ranks", "on_device", "autocast", "folder")
    )
    evaluation = HeldOutEvaluation(
        plan=SimpleNamespace(method=method), teachers=None, unsafe_sandbox=False, **parts
    )
    pairs = [(plain, sample), (seen, sample)]
    effects = evaluation._context_effects(Teachers({"": HalfSure()}), pairs, [scores(), scores()])
    each = 0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75)
    assert effects[0].tolist() == [0.0, 0.0]
    assert effects[1] == pytest.approx([2 * each, 2])

"""Held-out samples token by token: numbers that are the model's own, in a file that stays small."""

import json

import numpy as np
import pytest
import torch

from shared.sparse import SparseLogprobs
from student_trainer.data.collate import model_inputs, predicting_positions
from student_trainer.data.sample import Sample
from student_trainer.losses import Divergence, generalized_jsd
from student_trainer.model.forward import SparseTargets, install_sparse_loss
from student_trainer.pipeline.targets import ScoredSample, sparse_distribution
from student_trainer.reporting.runs import HELD_OUT_FILE, read_held_out
from student_trainer.training import held_out
from tests.unit.student_trainer.model.test_head import SHARED, Halved, tiny


class Letters:
    """Decodes each id as one character."""

    def __call__(self, text, **options):
        return {"input_ids": [ord(char) - ord("A") for char in text]}

    def get_vocab(self):
        return {}

    def decode(self, ids, **options):
        return "".join(chr(ord("A") + i) for i in ids)


def scored(length=9, start=4):
    """A sample whose teacher names every token, and its [T, V] log-probs."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, SHARED, length).astype(np.uint32)
    count = length - start
    logprobs = torch.from_numpy(rng.normal(size=(count, SHARED))).log_softmax(-1).float()
    every = np.tile(np.arange(SHARED, dtype=np.uint32), (count, 1))
    next_logprob = logprobs[torch.arange(count), torch.from_numpy(ids[start:].astype(int))]
    scores = SparseLogprobs(
        token_ids=every,
        logprobs=logprobs.numpy(),
        next_token_logprob=next_logprob.numpy(),
        tail_logprob=np.full(count, -np.inf, np.float32),
    )
    sample = Sample(ids, start, np.ones(count, bool), "dataset")
    return ScoredSample(sample, scores), logprobs


def inputs(item, divergence):
    samples = [item.sample]
    return {
        **model_inputs(samples, 0, packed=False),
        "sparse_targets": SparseTargets(
            positions=predicting_positions(samples, [item.sample.completion_mask], packed=False),
            teacher=sparse_distribution([item], SHARED),
            divergence=divergence,
            normalizer=1.0,
            vocab_size=SHARED,
        ),
    }


@pytest.mark.parametrize("family", ["llama with bias", "gemma2", "unknown"])
@pytest.mark.parametrize(("beta", "temperature"), [(0.0, 1.0), (0.5, 2.0)])
def test_what_is_shown_is_the_dense_divergence_and_the_models_own_probabilities(
    family, beta, temperature
):
    model = Halved(tiny("llama")) if family == "unknown" else tiny(family)
    model.eval()
    item, teacher = scored()
    ids = torch.from_numpy(item.sample.token_ids.astype(np.int64))[None]
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, item.sample.completion_start - 1 : -1, :SHARED]
    install_sparse_loss(model)
    divergence = Divergence(beta, temperature)
    seen = held_out.look(model, inputs(item, divergence), Letters())
    # The teacher's log-probs are at that temperature already.
    expected = generalized_jsd(logits, teacher * temperature, divergence)
    assert seen["divergence"] == pytest.approx(expected.tolist(), abs=2e-4)
    shares = (logits / temperature).softmax(-1)
    for row, support in enumerate(seen["support"]):
        assert 5 <= len(support) <= 10
        for token, of_teacher, of_student in support:
            i = ord(token) - ord("A")
            assert of_teacher == pytest.approx(float(teacher[row, i].exp()), abs=1e-4)
            assert of_student == pytest.approx(float(shares[row, i]), abs=1e-4)
        named = {token for token, *_ in support}
        assert named >= set(map(Letters().decode, shares[row].topk(5).indices[:, None].tolist()))
        assert named >= set(map(Letters().decode, teacher[row].topk(5).indices[:, None].tolist()))


def test_long_samples_are_cut_by_learned_tokens():
    mask = np.tile([False, True], 300)
    sample = Sample(np.zeros(604, np.uint32), 4, mask, "dataset")
    short = held_out.cut(ScoredSample(sample, None)).sample
    assert short.completion_mask.sum() == held_out.TOKENS
    assert short.completion_mask[: 2 * held_out.TOKENS].sum() == held_out.TOKENS


def evaluation(divergence):
    return {"divergence": [divergence], "support": [[["x", 0.5, 0.25]]]}


def test_the_first_and_the_latest_evaluation_are_kept(tmp_path):
    sample = {"name": "a:1", "prompt": "p", "source": "dataset", "tokens": ["x"]}

    def write(step, first, **other):
        return held_out.write(
            tmp_path, [{**sample, **other}], [evaluation(1.0 / (step + 1))], [("own", True)],
            step=step, first=first, beta=0.5,
        )  # fmt: skip

    first = write(0, None)
    write(10, first)
    write(20, first)
    content = read_held_out(tmp_path)
    assert content["beta"] == 0.5
    (one,) = content["samples"]
    assert [e["step"] for e in one["evaluations"]] == [0, 20]
    assert one["evaluations"][0]["divergence"] == [1.0]
    assert one["evaluations"][1]["completion"] == "own"
    other = write(20, first, tokens=["y"])  # another data set: nothing to compare with
    assert [e["step"] for e in other["samples"][0]["evaluations"]] == [20]
    assert [path.name for path in tmp_path.iterdir()] == [HELD_OUT_FILE]


def test_the_file_is_bounded(tmp_path):
    full = {
        "divergence": [12.3456] * held_out.TOKENS,
        "support": [[["\u20ac" * 8, 0.1234, 0.1234]] * (2 * held_out.TOP)] * held_out.TOKENS,
    }
    samples = [
        {"name": "n", "prompt": "p" * 4000, "source": "dataset", "tokens": ["t"] * held_out.TOKENS}
        for _ in range(held_out.COUNT)
    ]
    written = [("c" * 100_000, False)] * held_out.COUNT
    first = held_out.write(tmp_path, samples, [full] * held_out.COUNT, written, step=0, first=None)
    held_out.write(tmp_path, samples, [full] * held_out.COUNT, written, step=1, first=first)
    assert (tmp_path / HELD_OUT_FILE).stat().st_size < 1e6
    assert len(json.dumps(first)) > 1e5

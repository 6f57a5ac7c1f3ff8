"""The student's own most probable tokens, proposed for the teacher to score."""

import numpy as np
import pytest
import torch

from student_trainer.data.sample import Sample
from student_trainer.model.forward import install_sparse_loss
from student_trainer.model.top_tokens import TopTokenProposals
from tests.unit.student_trainer.model.test_head import SHARED, Halved, tiny


def sample(length, start):
    rng = np.random.default_rng(length)
    mask = np.zeros(length - start, bool)
    mask[-1] = True  # ids are proposed for rows that are not learned, too
    return Sample(rng.integers(0, SHARED, length).astype(np.uint32), start, mask, "student")


SAMPLES = [sample(9, 4), sample(5, 1), sample(7, 6)]


@pytest.mark.parametrize("batch_size", [1, 2, 8])
@pytest.mark.parametrize("family", ["llama with bias", "gemma2", "cohere", "unknown"])
def test_proposals_are_the_top_of_the_models_own_logits(family, batch_size, monkeypatch):
    model = Halved(tiny("llama")) if family == "unknown" else tiny(family)
    model.train()
    expected = []
    for one in SAMPLES:
        ids = torch.from_numpy(one.token_ids.astype(np.int64))[None]
        logits = model(input_ids=ids).logits[0, one.completion_start - 1 : -1, :SHARED]
        expected.append(logits.topk(3, dim=-1).indices.numpy())
    monkeypatch.setattr(
        "student_trainer.model.head.CHUNK_BYTES", 2 * 4 * SHARED
    )  # two rows a chunk
    install_sparse_loss(model)
    propose = TopTokenProposals(
        model, count=3, vocab_size=SHARED, pad_token_id=0, batch_size=batch_size
    )
    for found, ids in zip(propose(SAMPLES), expected, strict=True):
        assert found.dtype == np.uint32
        assert found.tolist() == ids.tolist()
    assert model.training


def test_forward_passes_depend_on_the_number_of_samples_alone():
    model = tiny("llama")
    install_sparse_loss(model)
    calls = []
    model.model.register_forward_hook(lambda *_: calls.append(1))
    propose = TopTokenProposals(model, count=1, vocab_size=SHARED, pad_token_id=0, batch_size=2)
    for samples in (SAMPLES, SAMPLES[:1] * 3):
        calls.clear()
        propose(samples)
        assert len(calls) == 2

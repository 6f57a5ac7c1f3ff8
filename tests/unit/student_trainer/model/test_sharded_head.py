"""The fused loss in models that FSDP2 has sharded over two processes."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.multiprocessing import start_processes

from student_trainer.model.forward import SparseTargets, TopTokens, install_sparse_loss
from tests.support import forked
from tests.unit.student_trainer.model.test_head import (
    SHARED,
    assert_same,
    batch,
    expected_loss,
    gradients,
    tiny,
)

RANKS = 2
LAYERS = 2


def of_rank(rank, inputs, targets):
    """One of the two sequences, and the part of the targets that lies in it."""
    width = inputs["input_ids"].shape[1]
    chosen = torch.nonzero(targets.positions // width == rank)[:, 0]
    first, last = int(chosen[0]), int(chosen[-1]) + 1
    return (
        {name: tensor[rank : rank + 1] for name, tensor in inputs.items()},
        SparseTargets(
            targets.positions[first:last] - rank * width, targets.teacher[first:last],
            targets.divergence, targets.normalizer, targets.vocab_size,
        ),
    )  # fmt: skip


def check_rank(rank, folder, apart, tied):
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS
    )
    torch.set_num_threads(1)
    model = tiny("qwen2", tie_word_embeddings=tied)
    inputs, targets = batch(0.5, temperature=1.5)
    expected = expected_loss(model, inputs, targets)
    expected_gradients = gradients(expected, model)
    mine, own_targets = of_rank(rank, inputs, targets)
    logits = model(**mine).logits[0, own_targets.positions, :SHARED]
    own_top = logits.topk(3).indices

    install_sparse_loss(model)
    mesh = init_device_mesh("cpu", (RANKS,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    if apart:
        fully_shard(model.lm_head, mesh=mesh)
    fully_shard(model, mesh=mesh)
    groups = LAYERS + 1 + apart  # each is gathered by one call
    for _ in range(2):  # the second step finds what the first has left
        model.zero_grad()
        with torch.no_grad():
            found = model(**mine, top_tokens=TopTokens(own_targets.positions, 3, SHARED))
        assert torch.equal(found["token_ids"], own_top)
        assert not apart or isinstance(model.lm_head.weight, DTensor)
        with CommDebugMode() as traffic:
            loss = model(**mine, sparse_targets=own_targets)["loss"]
        assert 0 < sum(traffic.get_comm_counts().values()) <= groups
        (loss * RANKS).backward()  # FSDP takes the mean over ranks
        assert isinstance(model.lm_head.weight, DTensor)
        total = loss.detach().clone()
        dist.all_reduce(total)
        assert total.item() == pytest.approx(expected.item(), rel=1e-9)
        actual = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
        assert_same(actual, expected_gradients)
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("apart", "tied"),
    [(False, True), (False, False), (True, False)],
    ids=["tied to the embeddings", "with the model", "on its own"],
)
def test_two_ranks_with_a_sharded_head_equal_one(tmp_path, apart, tied):
    start_processes(
        check_rank, (str(tmp_path), apart, tied), nprocs=RANKS, start_method=forked.METHOD
    )

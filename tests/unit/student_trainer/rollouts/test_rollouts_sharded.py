"""Two ranks with one sharded model, and completions of different number and length."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.fsdp import fully_shard

from student_trainer.rollouts import RolloutRequest, TransformersRollouts
from tests.support import forked
from tests.support.models import small_model


def engine(model, one_group):
    return TransformersRollouts(
        model, stop_ids=range(1, 5), pad_token_id=0, max_new_tokens=40, temperature=1.0,
        batch_size=3, vocab_size=64, one_group=one_group,
    )  # fmt: skip


def asked_of(rank):
    """Seven of one rank, two of the other."""
    rng = np.random.default_rng(rank)
    return [
        RolloutRequest(rng.integers(5, 64, rng.integers(2, 12)).astype(np.uint32), (rank, i))
        for i in range([7, 2][rank])
    ]


def written(engine, requests):
    groups = list(engine.generate(requests))
    rollouts = dict(item for group in groups for item in group)
    return len(groups), [rollouts[i].token_ids.tolist() for i in range(len(requests))]


def rank_of_two(rank, store, one_group, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    model = small_model()
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    passes = [0]
    model.model.layers[0].register_forward_hook(lambda *_: passes.__setitem__(0, passes[0] + 1))
    groups, completions = written(engine(model, one_group), asked_of(rank))
    dist.barrier()
    results[rank] = (groups, passes[0], completions)
    dist.destroy_process_group()


@pytest.mark.parametrize("one_group", [False, True])
def test_ranks_of_a_sharded_model_write_what_a_whole_one_writes_in_step(tmp_path, one_group):
    with forked.CONTEXT.Manager() as manager:
        results = manager.dict()
        arguments = (str(tmp_path / "store"), one_group, results)
        mp.start_processes(rank_of_two, arguments, nprocs=2, start_method=forked.METHOD)
        ranks = [results[0], results[1]]
    assert ranks[0][1] == ranks[1][1]  # as many forward passes, though one had less to do
    assert [groups == 1 for groups, _, _ in ranks] == [one_group, one_group]
    for rank, (_, _, completions) in enumerate(ranks):
        assert completions == written(engine(small_model(), False), asked_of(rank))[1]

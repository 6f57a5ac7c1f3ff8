"""The ranks that share an engine: who leads, whose prompts are whose, and who hears of an error."""

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp

from shared.errors import RolloutError
from student_trainer.rollouts.engine_group import EngineGroup
from student_trainer.runtime.ranks import from_all_ranks
from tests.support import forked

ITEMS = [["a", "b", "c"], ["d"]]


def shout(items):
    """Give results in another order than the items came."""
    for index in reversed(range(len(items))):
        yield index, items[index].upper()


def break_off(items):
    yield 0, items[0].upper()
    raise RolloutError("the engine is dead")


def rank_of_two(rank, store, size, results):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    group = EngineGroup(size)
    found = {
        "leads": group.leads,
        "group": group.gather(rank),
        "all": from_all_ranks(rank),
        "spread": dict(group.spread(ITEMS[rank], shout)),
        "none": dict(group.spread([], shout)),
    }
    got = []
    try:
        got.extend(group.spread(ITEMS[rank], break_off))
    except RolloutError as error:
        found["broken"] = (got, str(error))
    dist.barrier()
    results[rank] = found
    dist.destroy_process_group()


@pytest.mark.parametrize("size", [1, 2], ids=["one engine each", "one engine for both"])
def test_each_rank_gets_its_own_results_and_errors(tmp_path, size):
    with forked.CONTEXT.Manager() as manager:
        results = manager.dict()
        arguments = (str(tmp_path / "store"), size, results)
        mp.start_processes(rank_of_two, arguments, nprocs=2, start_method=forked.METHOD)
        ranks = [results[0], results[1]]
    dead = "the engine is dead"
    shared = size == 2
    assert [found["leads"] for found in ranks] == [True, not shared]
    assert [found["group"] for found in ranks] == ([[0, 1]] * 2 if shared else [[0], [1]])
    assert [found["all"] for found in ranks] == [[0, 1]] * 2
    assert [found["spread"] for found in ranks] == [{0: "A", 1: "B", 2: "C"}, {0: "D"}]
    assert [found["none"] for found in ranks] == [{}, {}]
    assert [found["broken"] for found in ranks] == [
        ([(0, "A")], dead),
        ([], dead) if shared else ([(0, "D")], dead),
    ]


def test_a_process_alone_has_its_own_engine():
    group = EngineGroup()
    assert group.leads
    assert from_all_ranks(3) == group.gather(3) == [3]
    assert dict(group.spread(["a"], shout)) == {0: "A"}

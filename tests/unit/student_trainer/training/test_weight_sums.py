"""The sums by which the weights of a checkpoint are told from others, over sharded models too."""

import copy
import json

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.multiprocessing import start_processes

from shared.errors import CheckpointError
from student_trainer.training.weights import check_sums, keep_sums, sum_weights
from tests.support import forked
from tests.support.models import small_model

RANKS = 2


def test_sums_tell_weights_apart_but_not_the_order_of_adding(tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Linear(300, 200)
    keep_sums(sum_weights(model), tmp_path)
    check_sums(model, tmp_path)
    sums = json.loads((tmp_path / "weights.json").read_text())
    sums["weight"][1] += 1e-12
    (tmp_path / "weights.json").write_text(json.dumps(sums))
    check_sums(model, tmp_path)
    check_sums(copy.deepcopy(model).bfloat16(), tmp_path)  # rounded
    with torch.no_grad():
        model.bias[0] += 1e-6
    with pytest.raises(CheckpointError, match="1 weights are not what was saved, bias among"):
        check_sums(model, tmp_path)


def transposed(weight):
    return weight.mT


def neighbours_swapped(weight):
    flat = weight.flatten().clone()
    flat[[17, 18]] = flat[[18, 17]]
    return flat.reshape(weight.shape)


def rows_reversed(weight):
    return weight.flip(0)


@pytest.mark.parametrize(
    "permute", [transposed, neighbours_swapped, rows_reversed], ids=lambda one: one.__name__
)
@pytest.mark.parametrize("shape", [(64, 64), (3, 8, 16)], ids=["matrix", "experts"])
def test_a_permutation_of_a_weight_is_another_weight(tmp_path, shape, permute):
    torch.manual_seed(0)
    model = torch.nn.ParameterDict({"w": torch.randn(shape)})
    keep_sums(sum_weights(model), tmp_path)
    check_sums(model, tmp_path)
    changed = permute(model["w"].detach()).reshape(shape).contiguous()
    model["w"] = torch.nn.Parameter(changed)
    with pytest.raises(CheckpointError, match="1 weights are not what was saved, w among"):
        check_sums(model, tmp_path)


def test_a_checkpoint_of_before_there_was_an_ordered_sum_is_compared_without(tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Linear(30, 20)
    keep_sums(sum_weights(model), tmp_path)
    sums = json.loads((tmp_path / "weights.json").read_text())
    (tmp_path / "weights.json").write_text(json.dumps({n: s[:3] for n, s in sums.items()}))
    check_sums(model, tmp_path)
    with torch.no_grad():
        model.bias += 1e-3
    with pytest.raises(CheckpointError, match="bias among"):
        check_sums(model, tmp_path)


def test_a_weight_without_dimensions_or_elements_has_sums():
    model = torch.nn.ParameterDict({"one": torch.tensor(2.0), "none": torch.zeros(0, 3)})
    sums = sum_weights(model)
    assert (sums["one"].ordered, sums["none"].ordered) == (2.0, 0.0)


def test_weights_that_only_one_of_both_has_are_refused(tmp_path):
    model = torch.nn.Linear(3, 2)
    keep_sums(sum_weights(model), tmp_path)
    with pytest.raises(CheckpointError, match="2 weights are not what was saved, bias among"):
        check_sums(torch.nn.ReLU(), tmp_path)
    keep_sums({}, tmp_path)
    with pytest.raises(CheckpointError, match="2 weights are not what was saved, bias among"):
        check_sums(model, tmp_path)
    check_sums(model.requires_grad_(False), tmp_path)  # only what is trained is kept


def test_a_file_that_is_missing_is_no_error_and_a_damaged_one_is(tmp_path):
    """Checkpoints of earlier versions have none."""
    model = torch.nn.Linear(3, 2)
    check_sums(model, tmp_path)
    (tmp_path / "weights.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"weights\.json cannot be read"):
        check_sums(model, tmp_path)


def check_rank(rank, folder):
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS
    )
    model = small_model()
    whole = sum_weights(model)
    fully_shard(model, mesh=init_device_mesh("cpu", (RANKS,)))
    sharded = sum_weights(model)
    assert sharded.keys() == whole.keys()
    assert all(sharded[name].is_of_same(whole[name]) for name in whole)
    assert all(sums.ordered is not None for sums in sharded.values())
    if rank == 0:
        keep_sums(whole, folder)
    dist.barrier()
    check_sums(model, folder)
    norm = model.model.norm.weight
    assert isinstance(norm, DTensor)
    if rank == 1:
        norm.to_local().data.add_(1e-3)
    with pytest.raises(CheckpointError, match=r"1 weights are not what was saved, model\.norm"):
        check_sums(model, folder)
    if rank == 1:
        norm.to_local().data.add_(-1e-3)
        up = model.model.layers[0].mlp.up_proj.weight.to_local()
        up.data.copy_(up.data.flip(0))
    with pytest.raises(CheckpointError, match=r"weights are not what was saved, model\.layers\.0"):
        check_sums(model, folder)
    dist.destroy_process_group()


def check_meshes(rank, folder):
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meshes", rank=rank, world_size=RANKS
    )
    torch.manual_seed(0)
    whole = torch.randn(7, 5)  # not divisible by the ranks
    expected = sum_weights(torch.nn.ParameterDict({"w": whole}))["w"]
    mesh = init_device_mesh("cpu", (RANKS,))
    for placement in (Shard(0), Shard(1), Replicate()):
        sharded = distribute_tensor(whole, mesh, [placement])
        [found] = sum_weights(torch.nn.ParameterDict({"w": sharded})).values()
        assert found.ordered == pytest.approx(expected.ordered, rel=1e-12)
    dist.destroy_process_group()


def test_a_weight_has_one_ordered_sum_however_it_is_placed(tmp_path):
    start_processes(check_meshes, (tmp_path,), nprocs=RANKS, start_method=forked.METHOD)


def test_two_ranks_with_a_sharded_model_have_the_sums_of_the_whole(tmp_path):
    start_processes(check_rank, (tmp_path,), nprocs=RANKS, start_method=forked.METHOD)

"""The files by which an engine on the same machine gets the student's weights."""

import os
import shutil
import signal
from collections import namedtuple

import pytest
import torch
from safetensors.torch import load_file

from shared.errors import RolloutError
from student_trainer.rollouts import layer_files
from student_trainer.rollouts.layer_files import LayerFiles
from student_trainer.rollouts.weights import StudentWeights
from tests.support.models import small_model


@pytest.fixture
def weights():
    return StudentWeights(small_model(), torch.float32)


@pytest.fixture
def files(weights, monkeypatch, tmp_path):
    monkeypatch.setattr(layer_files, "_SHARED_MEMORY", tmp_path)
    opened = LayerFiles(weights)
    assert opened.path.parent == tmp_path
    yield opened
    opened.close()
    assert not list(tmp_path.iterdir())


def held(files):
    return [path.name for path in files.path.iterdir()]


def test_each_file_holds_one_layer_and_all_hold_the_model(weights, files):
    read = []
    files.send(lambda file: read.append(load_file(file)))
    assert held(files) == []
    together = {name: value for layer in read for name, value in layer.items()}
    assert len(together) == sum(map(len, read))
    expected = dict(weights)
    assert together.keys() == expected.keys()
    assert all(torch.equal(together[name], value) for name, value in expected.items())
    for layer in read:  # one number, or none
        assert len({name.split(".")[2] for name in layer if ".layers." in name}) <= 1
    assert len(read) > 2
    assert weights.largest_layer == max(sum(v.nbytes for v in layer.values()) for layer in read)


def test_a_rank_whose_engine_fails_gathers_to_the_end(weights, files):
    """Else those that gather with it would wait for ever."""
    gathered = []
    whole = weights._whole
    weights._whole = lambda key, value: gathered.append(key) or whole(key, value)

    def fail(file):
        raise RolloutError("dead")

    with pytest.raises(RolloutError, match="dead"):
        files.send(fail)
    assert len(gathered) == len(weights.shapes())
    assert held(files) == []


def test_no_weights_stay_in_shared_memory_when_a_transfer_is_terminated(files):
    def terminate(file):
        assert held(files) == [file.name]
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with pytest.raises(SystemExit):
            files.send(terminate)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert held(files) == []


@pytest.mark.parametrize(("ranks", "fits"), [(1, True), (4, False)])
def test_shared_memory_is_used_where_a_layer_of_all_ranks_fits(
    weights, monkeypatch, tmp_path, ranks, fits
):
    monkeypatch.setattr(layer_files, "_SHARED_MEMORY", tmp_path)
    usage = namedtuple("usage", "free")(3 * weights.largest_layer)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    opened = LayerFiles(weights)
    assert (opened.path.parent == tmp_path) == fits
    opened.close()

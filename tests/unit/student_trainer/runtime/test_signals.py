"""A process that is told to end clears up first."""

import math
import os
import shutil
import signal
import tempfile
import threading
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from student_trainer.rollouts import vllm
from student_trainer.runtime.signals import signals_as_exits, stop_event


@pytest.fixture(autouse=True)
def defaults():
    """Also where the tests themselves run under nohup."""
    numbers = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
    before = [signal.signal(number, signal.SIG_DFL) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_would_end_the_process_raises(number):
    with pytest.raises(SystemExit) as caught, signals_as_exits():
        os.kill(os.getpid(), number)
    assert caught.value.code == 128 + number
    assert signal.getsignal(number) is signal.SIG_DFL


def test_what_nohup_ignores_stays_ignored():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with signals_as_exits():
        os.kill(os.getpid(), signal.SIGHUP)
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


@pytest.fixture
def engine(tmp_path):
    """The part of a `VllmEngine` that hands weights over, without vLLM."""
    config = LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    engine = object.__new__(vllm.VllmEngine)
    engine.model, engine.dtype = LlamaForCausalLM(config), "float32"
    engine._folder = tempfile.TemporaryDirectory(dir=tmp_path)
    return engine


def test_no_weights_stay_in_shared_memory_when_a_transfer_is_terminated(engine):
    def weights():
        return list(Path(engine._folder.name).glob("*.safetensors"))

    def terminated_transfer():
        with engine._exported():
            assert weights()
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit):
        terminated_transfer()
    assert not weights()


@pytest.mark.parametrize(("ranks", "fits"), [(1, True), (4, False)])
def test_shared_memory_is_used_where_all_ranks_weights_fit(
    engine, monkeypatch, tmp_path, ranks, fits
):
    monkeypatch.setattr(vllm, "_SHARED_MEMORY", tmp_path)
    size = 4 * sum(p.numel() for p in engine.model.parameters())
    usage = namedtuple("usage", "free")(2 * size)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    assert vllm._weights_folder(engine.model, torch.float32) == (tmp_path if fits else None)


def test_ctrl_c_is_left_alone_where_sigterm_is_handled(monkeypatch):
    """A study or the quickstart must end by it, and not go on with a model half-trained."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    with pytest.raises(KeyboardInterrupt), stop_event(math.inf, lambda: None) as event:
        os.kill(os.getpid(), signal.SIGINT)
    assert not event.is_set()


def test_the_first_signal_sets_the_event_and_says_so_and_handlers_are_put_back():
    signal.signal(signal.SIGINT, signal.default_int_handler)
    said = threading.Event()
    with stop_event(math.inf, lambda: None, said.set) as event:
        os.kill(os.getpid(), signal.SIGINT)
        assert event.is_set()
        assert said.wait(10)
        os.kill(os.getpid(), signal.SIGTERM)  # as a launcher passes Ctrl-C on
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL

"""The transfer of weights on the trainer's side, without vLLM."""

from __future__ import annotations

import threading

import pytest
import torch

from shared.errors import RolloutError
from student_trainer.rollouts import transfer
from student_trainer.rollouts.transfer import ServerControl, Transfer
from student_trainer.runtime.threads import in_thread
from tests.support.stub_rollout_server import stub_rollout_servers


class Weights:
    """Three weights; a rank that gathers a sharded one waits until all ranks do."""

    def __init__(self):
        self.given = 0

    def __iter__(self):
        for name in "abc":
            self.given += 1
            yield name, torch.zeros(1)


class Failing:
    """An engine that fails when it has taken so many weights, as vLLM's NCCL engine may."""

    def __init__(self, source, after):
        self.source, self.after = source, after

    def send_weights(self):
        for taken, _ in enumerate(self.source if self.after else [0]):
            if taken + 1 >= self.after:
                raise RuntimeError("a server died")


@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_rank_that_fails_to_send_still_gathers_with_the_others(after):
    weights = Weights()
    source = transfer._Source(weights)
    for _ in range(2):
        weights.given = 0
        with pytest.raises(RuntimeError, match="a server died"):
            Transfer(Failing(source, after), source).send()
        assert weights.given == 3


def test_weights_that_were_sent_are_gathered_once():
    class Engine:
        def send_weights(self):
            assert [name for name, _ in source] == ["a", "b", "c"]

    weights = Weights()
    source = transfer._Source(weights)
    Transfer(Engine(), source).send()
    assert weights.given == 3


def test_nobody_waits_for_the_group_when_a_server_refuses():
    never = threading.Event()
    with stub_rollout_servers(2) as stubs:
        stubs[1].answers["/init_weight_transfer_engine"] = (500, {"error": "it is for nccl"})
        stubs[0].before = lambda path: path == "/init_weight_transfer_engine" and never.wait(10)
        control = ServerControl([stub.url for stub in stubs], seconds=20, headers={})

        def join():
            in_thread(lambda: control.init_weight_transfer_engine({"rank_offset": 1}), name="init")
            never.wait(10)

        with pytest.raises(RolloutError, match="it is for nccl"):
            transfer._unless_refused(join, control)
        never.set()
        control.close()


class Way:
    """A connection from one address of this machine."""

    def __init__(self, own):
        self.own, self.family = own, transfer.socket.AF_INET

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    def getsockname(self):
        return self.own, 1


def test_the_group_meets_where_servers_of_other_machines_reach_it(monkeypatch):
    own = {"127.0.0.1": "127.0.0.1", "gpu2": "127.0.0.2"}
    monkeypatch.setattr(
        transfer.socket, "create_connection", lambda place, timeout: Way(own[place[0]])
    )
    loopback = {"127.0.0.1"}
    monkeypatch.setattr(
        transfer, "ip_address", lambda text: type("Ip", (), {"is_loopback": text in loopback})
    )
    address, port = transfer._own_address(["http://127.0.0.1:8001", "http://gpu2:8001"])
    assert address == "127.0.0.2"
    assert port > 0


def test_a_server_that_is_not_reached_is_named():
    with pytest.raises(RolloutError, match=r"http://127\.0\.0\.1:1 is not reachable"):
        transfer._own_address(["http://127.0.0.1:1"])

"""A sender that would wait for a dead server for ever, as NCCL does, and is ended."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest

from shared.errors import RolloutError
from student_trainer.rollouts.transfer import ServerControl, open_transfer
from tests.support.stub_rollout_server import stub_rollout_servers
from tests.support.vllm import VLLM

pytestmark = VLLM
FACTORY = "vllm.distributed.weight_transfer.factory.WeightTransferTrainerFactory"


class Endless:
    """An engine whose sending ends only when it is shut down."""

    def __init__(self, client):
        self.client, self.ended = client, threading.Event()

    def send_weights(self):
        loading = threading.Thread(target=self._load)
        loading.start()
        assert self.ended.wait(20)
        loading.join()
        raise self.error

    def _load(self):
        try:
            self.client.update_weights({"names": []})
        except RolloutError as error:
            self.error = error

    def shutdown(self):
        self.ended.set()


@pytest.mark.parametrize("cause", ["dies", "hangs", "told"])
def test_a_sender_is_ended_where_a_server_receives_nothing(monkeypatch, cause):
    monkeypatch.setattr(f"{FACTORY}.trainer_init", lambda info, client, source: Endless(client))
    released, told = threading.Event(), []
    weights = SimpleNamespace(shapes=list, __iter__=lambda self: iter(()))
    with stub_rollout_servers(2) as stubs:
        stubs[0].before = lambda path: path == "/update_weights" and released.wait(30)
        if cause == "dies":
            stubs[1].answers["/update_weights"] = (500, {"error": "dead"})
        else:
            stubs[1].before = stubs[0].before
        control = ServerControl(
            [stub.url for stub in stubs],
            seconds=600.0 if cause == "told" else 1.0,
            headers={},
            told_to_end=lambda: bool(told),
        )
        transfer = open_transfer("nccl", weights, control, seconds=1.0)
        transfer._source.give_rest = lambda: None
        if cause == "told":
            threading.Timer(0.3, told.append, [True]).start()
        try:
            with pytest.raises(RolloutError, match=r"dead|timed out|told to end"):
                transfer.send()
        finally:
            released.set()
            control.close()

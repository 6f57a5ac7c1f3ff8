"""Many rollout servers cost a step no more calls after one another than one does."""

import json
import threading
from http.server import ThreadingHTTPServer

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from student_trainer.rollouts import server
from student_trainer.rollouts.drift import trainer_logprobs
from student_trainer.rollouts.server import RolloutServers, ServerOptions, wait_for_servers
from student_trainer.rollouts.transfer import ServerControl
from tests.support import stub

PATIENCE = 10.0


def as_json(value):
    return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()


class Together:
    """Servers that answer only once all have been asked the same; each has a folder of its own."""

    def __init__(self, count, tokens=lambda name: [5, 6]):
        self.barrier = threading.Barrier(count)
        self.tokens = tokens

    def get(self, path):
        self.barrier.wait(PATIENCE)
        return as_json({"data": [{"max_model_len": 64}]})

    def post(self, path, body):
        self.barrier.wait(PATIENCE)
        written = self.tokens(path.split("/")[1])
        content = [{"logprob": -1.0} for _ in written]
        return as_json({"choices": [{"token_ids": written, "logprobs": {"content": content}}]})


@pytest.fixture
def options():
    return lambda url, count: ServerOptions(
        tuple(f"{url}/{name}" for name in range(count)), "gloo", seconds=PATIENCE
    )


def test_servers_are_looked_for_at_once(options):
    with stub.serving(Together(3)) as url:
        asked = options(url, 3)
        assert wait_for_servers(asked, 64) == list(asked.urls)


@pytest.mark.parametrize(
    ("tokens", "passes"), [(lambda name: [5, 6], 1), (lambda name: [int(name)], 3)]
)
def test_probes_are_asked_at_once_and_equal_ones_are_checked_once(
    options, monkeypatch, tokens, passes
):
    checked = []

    def counted(model, token_ids):
        checked.append(token_ids)
        return trainer_logprobs(model, token_ids)

    monkeypatch.setattr(server, "trainer_logprobs", counted)
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 50}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=1))
    with stub.serving(Together(3, tokens)) as url:
        servers = RolloutServers(model, options(url, 3), dtype="float32", longest=64)
        servers.live = list(servers.options.urls)
        drift = servers._measure_drift()
    assert len(checked) == passes
    lines = [trainer_logprobs(model, ids) for ids in checked]
    worst = max(
        float((rows[15:-1].gather(1, torch.tensor(ids[16:])[:, None]) + 1).abs().mean())
        for ids, rows in zip(checked, lines, strict=True)
    )
    assert drift == pytest.approx(worst, abs=1e-6)


def test_more_servers_than_a_client_has_connections_by_default_join_together(monkeypatch):
    count = 101
    monkeypatch.setattr(ThreadingHTTPServer, "request_queue_size", 2 * count)
    with stub.serving(Together(count)) as url:
        urls = [f"{url}/{name}" for name in range(count)]
        control = ServerControl(urls, seconds=PATIENCE, headers={})
        control.finish_weight_update("1")
        control.close()

"""Many rollout servers cost a step no more calls after one another than one does."""

import json
import threading
from collections import Counter
from http.server import ThreadingHTTPServer
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from student_trainer.rollouts import RolloutServers, ServerOptions, ServerRollouts, drift
from student_trainer.rollouts.base import RolloutRequest
from student_trainer.rollouts.drift import trainer_logprobs
from student_trainer.rollouts.http import wait_for_servers
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
        return as_json({"data": [{"max_model_len": 64}], "weight_version": "1"})

    def post(self, path, body):
        self.barrier.wait(PATIENCE)
        written = self.tokens(path.split("/")[1])
        content = [{"logprob": -1.0} for _ in written]
        choice = {
            "token_ids": written, "logprobs": {"content": content}, "finish_reason": "stop",
            "weight_versions": [{"version": "1"}],
        }  # fmt: skip
        return as_json({"choices": [choice]})


@pytest.fixture
def options():
    return lambda url, count: ServerOptions(
        tuple(f"{url}/{name}" for name in range(count)), "gloo", seconds=PATIENCE
    )


def test_servers_are_looked_for_at_once(options):
    with stub.serving(Together(3)) as url:
        asked = options(url, 3)
        assert list(wait_for_servers(asked, 64)) == list(asked.urls)


@pytest.mark.parametrize(
    ("tokens", "passes"),
    [(lambda name: [5, 6], 1), (lambda name: [int(name)], 3)],
    ids=["equal", "different"],
)
def test_probes_are_asked_at_once_and_equal_ones_are_checked_once(
    options, monkeypatch, tokens, passes
):
    checked = []

    def counted(model, token_ids):
        checked.append(token_ids)
        return trainer_logprobs(model, token_ids)

    monkeypatch.setattr(drift, "trainer_logprobs", counted)
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 50}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=1))
    with stub.serving(Together(3, tokens)) as url:
        opened = RolloutServers(model, options(url, 3), dtype="float32", longest=64)
        opened.live = list(opened.options.urls)
        measured = max(opened._measure_drifts().values())
    assert len(checked) == passes
    lines = [trainer_logprobs(model, ids) for ids in checked]
    worst = max(
        float((rows[15:-1].gather(1, torch.tensor(ids[16:])[:, None]) + 1).abs().mean())
        for ids, rows in zip(checked, lines, strict=True)
    )
    assert measured == pytest.approx(worst, abs=1e-6)


def test_many_completions_in_flight_are_shared_among_small_clients(options, monkeypatch):
    count, sent = 40, Counter()
    post = httpx.AsyncClient.post

    def counted(client, *arguments, **more):
        sent[client] += 1
        return post(client, *arguments, **more)

    monkeypatch.setattr(httpx.AsyncClient, "post", counted)
    monkeypatch.setattr(ThreadingHTTPServer, "request_queue_size", 2 * count)
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=50))
    requests = [RolloutRequest(np.arange(3, dtype=np.uint32), (0, i)) for i in range(count)]
    with stub.serving(Together(count)) as url:
        asked = options(url, 2)
        opened = SimpleNamespace(
            model=SimpleNamespace(config=config),
            options=asked,
            live=list(asked.urls),
            label="1",
            adapter=None,
        )
        engine = ServerRollouts(
            opened, stop_ids=[1], max_new_tokens=2, temperature=1.0, vocab_size=50
        )
        written = dict(pair for group in engine.generate(requests) for pair in group)
    assert {index: one.token_ids.tolist() for index, one in written.items()} == {
        index: [5, 6] for index in range(count)
    }
    assert sum(sent.values()) == count
    assert max(sent.values()) <= 16  # a client's work for a request grows with its connections


def test_more_servers_than_a_client_has_connections_by_default_join_together(monkeypatch):
    count = 101
    monkeypatch.setattr(ThreadingHTTPServer, "request_queue_size", 2 * count)
    with stub.serving(Together(count)) as url:
        urls = [f"{url}/{name}" for name in range(count)]
        control = ServerControl(urls, seconds=PATIENCE, headers={})
        control.finish_weight_update("1")
        control.close()

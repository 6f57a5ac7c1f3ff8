"""Rollout servers that fail, refuse, lag or hold other weights; vLLM's are in tests/e2e."""

from __future__ import annotations

import logging
import threading
import time
from functools import partial

import httpx
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from shared.errors import ConfigurationError, RolloutError, RolloutServerError
from student_trainer.rollouts import (
    RolloutRequest,
    RolloutServers,
    ServerOptions,
    TokenFilter,
    drift,
)
from tests.support.stub_rollout_server import GENERATE, send_no_weights, stub_rollout_servers

JOIN = ["shutdown_weight_transfer_engine", "resume", "init_weight_transfer_engine"]
SEND = ["pause", "start_weight_update", "update_weights", "finish_weight_update", "resume"]
LEAVE = ["shutdown_weight_transfer_engine", "resume"]


@pytest.fixture(autouse=True)
def without_weights(monkeypatch):
    send_no_weights(monkeypatch)


@pytest.fixture(scope="module")
def student():
    return tiny()


def tiny(**options):
    config = LlamaConfig(
        vocab_size=50, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, **options,
    )  # fmt: skip
    return LlamaForCausalLM(config)


@pytest.fixture
def stubs():
    with stub_rollout_servers(2) as both:
        yield both


def opened(student, stubs, **options):
    urls = tuple(stub.url for stub in stubs)
    settings = {"seconds": 3.0, **options}
    return RolloutServers(
        student, ServerOptions(urls, "nccl", **settings), dtype="float32", longest=40
    )


def engine(both, **options):
    settings = {"stop_ids": [2], "max_new_tokens": 3, "temperature": 1.0, "vocab_size": 50}
    return both.rollouts(**{**settings, **options})


def requests(count):
    return [
        RolloutRequest(np.array([number + 1], np.uint32), key=(0, 0, number))
        for number in range(count)
    ]


def write(both, count=6, **options):
    found = [item for group in engine(both, **options).generate(requests(count)) for item in group]
    assert sorted(index for index, _ in found) == list(range(count))
    return {index: rollout.token_ids.tolist() for index, rollout in found}


def expected(count=6):
    return {number: [number + 1, 7, 7] for number in range(count)}


def test_all_servers_join_once_and_each_version_is_sent_in_order(student, stubs):
    with opened(student, stubs) as both:
        both.sync(0)
        both.sync(0)
        first = both.label
        both.sync(1)
        assert both.label != first
        assert [stub.version for stub in stubs] == [both.label] * 2
        assert not any(stub.paused for stub in stubs)
    for stub in stubs:
        assert stub.paths == [*JOIN, *SEND, *SEND, *LEAVE]
    infos = [dict(stub.calls)["/init_weight_transfer_engine"]["init_info"] for stub in stubs]
    assert [info["rank_offset"] for info in infos] == [1, 3]  # each server has two workers


def test_two_runs_never_give_their_weights_one_name(student, stubs):
    with opened(student, stubs[:1]) as mine, opened(student, stubs[:1]) as other:
        mine.sync(3)
        other.sync(3)
        with pytest.raises(RolloutServerError, match="no rollout server is left"):
            write(mine)
        assert write(other) == expected()


def test_a_server_that_was_started_again_joins_anew(student, stubs):
    with opened(student, stubs) as both:
        both.sync(0)
        stubs[1].version = "default"
        both.sync(1)
    for stub in stubs:
        assert stub.paths == [*JOIN, *SEND, *LEAVE, *JOIN, *SEND, *LEAVE]


@pytest.mark.parametrize(
    "fault",
    [
        {"answers": {GENERATE: (500, {})}},
        {"choice": {"finish_reason": "abort"}},
        {"choice": {"weight_versions": [{"version": "default"}]}},
        {"choice": {"weight_versions": None}},
    ],
    ids=["500", "abort", "other weights", "unknown weights"],
)
def test_what_a_failed_server_should_have_written_is_written_by_another(
    student, stubs, fault, caplog
):
    with opened(student, stubs) as both:
        both.sync(0)
        vars(stubs[0]).update(fault)
        with caplog.at_level(logging.WARNING):
            assert write(both) == expected()
        assert both.live == [stubs[1].url]
        seeds = {tuple(b["token_ids"]): b["sampling_params"]["seed"] for b in stubs[1].prompts}
        assert len(set(seeds.values())) == 6
    assert sum("is lost" in message for message in caplog.messages) == 1


def test_a_dead_server_is_passed_over_and_takes_part_no_more(student):
    with stub_rollout_servers(2) as [lasting, dying], opened(student, [lasting, dying]) as both:
        both.sync(0)
        dying.die()
        assert write(both) == expected()
        both.sync(1)
        assert both.live == [lasting.url]
        assert write(both) == expected()


def test_a_server_that_is_away_and_one_that_is_back_are_named_once(student, stubs, caplog):
    with opened(student, stubs) as both:
        for version, health in enumerate([200, 503, 503, 200, 200]):
            stubs[1].answers["/health"] = (health, {})
            both.sync(version)
        stubs[0].answers[GENERATE] = (500, {})
        write(both)
        del stubs[0].answers[GENERATE]
        both.sync(5)
        assert both.live == [stub.url for stub in stubs]
    assert [one for one in caplog.messages if "is lost" not in one] == [
        f"rollout server {stubs[1].url} does not answer; the run goes on without it",
        f"rollout server {stubs[1].url} is back",
        f"rollout server {stubs[0].url} is back",
    ]


def test_without_a_server_the_writing_ends_with_an_error(student, stubs):
    with opened(student, stubs) as both:
        both.sync(0)
        for stub in stubs:
            stub.answers[GENERATE] = (503, {})
        with pytest.raises(RolloutServerError, match="no rollout server is left"):
            write(both)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((400, {"error": "too long"}), "answered 400.*too long"),
        ((200, b"<html>"), "no JSON object: '<html>'"),
        ((200, {"choices": []}), "no completion"),
        ((200, {"choices": [{}]}), "malformed completion"),
    ],
    ids=["400", "no JSON", "no choice", "no fields"],
)
def test_an_answer_that_no_other_server_would_mend_is_an_error(student, stubs, answer, message):
    with opened(student, stubs) as both:
        both.sync(0)
        for stub in stubs:
            stub.answers[GENERATE] = answer
        with pytest.raises(RolloutError, match=message):
            write(both)


@pytest.mark.parametrize("failing", ["init_weight_transfer_engine", "update_weights"])
def test_a_transfer_that_fails_is_tried_three_times(student, stubs, failing):
    stubs[1].answers[f"/{failing}"] = (500, {"error": "no memory"})
    with opened(student, stubs) as both, pytest.raises(
        RolloutServerError, match=r"in 3 attempts.*no memory"
    ):  # fmt: skip
        both.sync(0)
    assert stubs[0].paths.count(failing) == 3
    assert not any(stub.paused for stub in stubs)
    if failing == "update_weights":  # what came in part is not told as the weights of a step
        assert stubs[1].version == "unfinished"


@pytest.mark.parametrize("path", ["/get_world_size", "/is_paused"])
def test_a_server_that_answers_nonsense_while_it_joins_is_one_line(student, stubs, path):
    stubs[0].answers[path] = (500, {"error": "dead"})
    with opened(student, stubs) as both:
        if path == "/is_paused":
            both.sync(0)
            assert len(both.live) == 2
        else:
            with pytest.raises(RolloutServerError, match=r"3 attempts.*answered 500"):
                both.sync(0)


def test_a_server_that_fails_a_probe_is_left_out(student, stubs):
    stubs[0].answers[GENERATE] = (500, {})
    with opened(student, stubs) as both:
        both.sync(0)
        assert both.live == [stubs[1].url]
        assert both.drift == 0


def test_a_server_with_other_log_probs_is_named(student, stubs, monkeypatch):
    monkeypatch.setattr(
        drift, "trainer_logprobs", lambda model, ids: torch.full((len(ids), 50), float("nan"))
    )
    with opened(student, stubs) as both, pytest.raises(RolloutError, match=stubs[0].url):
        both.sync(0)


def test_a_probe_fits_a_short_context(student, stubs):
    with opened(student, stubs) as both:
        both.longest = 6
        both.sync(0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"context": 39}, "context of 39 tokens.*up to 40; start it with --max-model-len 40"),
        ({"key": "other"}, "wants another key; see --rollout_api_key_file"),
        ({"answers": {"/weight_info": (404, {})}}, "takes no weights; start it with VLLM_SERVER"),
        ({"answers": {"/v1/models": (200, {"data": []})}}, "tells no context"),
        ({"answers": {"/v1/models": (302, b"")}}, "answered 302"),
    ],
    ids=["short context", "other key", "no weight routes", "no context", "redirect"],
)
def test_a_server_that_can_never_do_it_is_refused_at_once(student, stubs, change, message):
    vars(stubs[1]).update(change)
    with opened(student, stubs, api_key="secret") as both, pytest.raises(
        RolloutError, match=message
    ) as caught:  # fmt: skip
        both.sync(0)
    assert "secret" not in str(caught.value)


def test_the_key_is_sent_and_a_server_that_is_away_is_waited_for(student, stubs):
    for stub in stubs:
        stub.key = "secret"
        stub.answers["/health"] = (503, {})
    threading.Timer(0.3, stubs[1].answers.clear).start()
    with opened(student, stubs, api_key="secret") as both:
        both.sync(0)
        assert both.live == [stubs[1].url]
        assert write(both) == expected()


def test_the_wait_for_a_server_ends(student, stubs):
    for stub in stubs:
        stub.answers["/health"] = (503, {})
    with opened(student, stubs, seconds=0.1) as both, pytest.raises(
        RolloutServerError, match=r"no rollout server answers at .* after 0 s"
    ):  # fmt: skip
        both.sync(0)


def test_each_server_gets_so_many_requests_at_once_even_when_one_is_lost(student, stubs):
    def open_the_gate():
        until = time.monotonic() + 20
        while stubs[1].busy < 3 and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(0.1)  # in which a fourth would come
        stubs[1].gate.set()

    with opened(student, stubs, max_in_flight=3) as both:
        both.sync(0)
        stubs[0].answers[GENERATE] = (500, {})
        stubs[1].gate.clear()
        threading.Thread(target=open_the_gate).start()
        assert write(both, 12) == expected(12)
    assert stubs[1].busy == 3


class CountingGate:
    """Counts the tokens of requests that wait at any server, and lets each go after a moment."""

    def __init__(self, stubs):
        self.lock, self.now, self.most, self.order = threading.Lock(), 0, 0, []
        for stub in stubs:
            complete = stub._complete
            stub._complete = partial(self.complete, complete)

    def complete(self, complete, body):
        if "logprobs" in body["sampling_params"]:  # a probe
            return complete(body)
        tokens = len(body["token_ids"]) + body["sampling_params"]["max_tokens"]
        with self.lock:
            self.now += tokens
            self.most = max(self.most, self.now)
            self.order.append(len(body["token_ids"]))
        time.sleep(0.02)
        with self.lock:
            self.now -= tokens
        return complete(body)


@pytest.mark.parametrize(("bound", "most"), [(None, 61), (20, 20), (8, 8)])
def test_no_more_tokens_are_in_flight_than_the_bound(student, stubs, bound, most):
    """Prompts of 1 and 5 tokens, and completions of 3, so requests of 4 and 8."""
    asked = [
        RolloutRequest(np.full(5 if number % 3 else 1, number + 1, np.uint32), (0, 0, number))
        for number in range(9)
    ]
    gate = CountingGate(stubs)
    with opened(student, stubs, max_tokens_in_flight=bound) as both:
        both.sync(0)
        found = dict(item for group in engine(both).generate(asked) for item in group)
    assert {number: int(one.token_ids[0]) for number, one in found.items()} == {
        number: int(request.prompt_ids.sum()) % 50 for number, request in enumerate(asked)
    }
    assert gate.most <= most
    assert bound or gate.most > 20
    if bound == 8:  # one large request at once, in the order in which they were asked
        assert gate.order == [1, 5, 5, 1, 5, 5, 1, 5, 5]


def test_a_completion_over_the_bound_is_an_error(student, stubs):
    with opened(student, stubs, max_tokens_in_flight=3) as both:
        both.sync(0)
        with pytest.raises(RolloutError, match="up to 4 tokens, and this process may have 3 in"):
            write(both)


def test_the_bound_holds_after_a_server_is_lost(student, stubs):
    with opened(student, stubs, max_tokens_in_flight=8) as both:
        both.sync(0)
        stubs[0].answers[GENERATE] = (500, {})
        assert write(both, 12) == expected(12)
    assert stubs[1].busy <= 2


def test_how_tokens_are_sampled_is_sent_and_what_is_off_too(student, stubs):
    with opened(student, stubs[:1]) as one:
        one.sync(0)
        write(one, 1)
        write(one, 1, token_filter=TokenFilter(top_p=0.9, top_k=7, min_p=0.1))
    names = ("top_p", "top_k", "min_p", "repetition_penalty")
    sent = [tuple(body["sampling_params"][name] for name in names) for body in stubs[0].prompts]
    assert sent == [(1.0, 0, 0.0, 1.0), (0.9, 7, 0.1, 1.0)]


def test_one_that_stops_early_sends_nothing_more(student, stubs):
    with opened(student, stubs, max_in_flight=1) as both:
        both.sync(0)
        stubs[1].gate.clear()
        next(iter(engine(both).generate(requests(40))))
        stubs[1].gate.set()
        until = time.monotonic() + 20
        while any(t.name == "rollouts" for t in threading.enumerate()):
            assert time.monotonic() < until
            time.sleep(0.01)
        assert sum(len(stub.prompts) for stub in stubs) < 40
        assert write(both) == expected()


def test_completions_bring_the_students_most_probable_ids(student, stubs):
    with opened(student, stubs[:1]) as one:
        one.sync(0)
        writer = engine(one, student_top_m=3)
        [[(_, rollout)]] = writer.generate(requests(1))
        assert stubs[0].prompts[0]["sampling_params"]["logprobs"] == 4
        assert rollout.proposed.tolist() == [[0, 1, 2]] * 3
        stubs[0].choice = {"logprobs": None}
        with pytest.raises(RolloutError, match="malformed completion"):
            list(writer.generate(requests(1)))


def test_nothing_to_write_is_no_request(student, stubs):
    with opened(student, stubs) as both:
        both.sync(0)
        assert write(both, 0) == {}


def test_adapters_of_tied_weights_are_refused(stubs):
    config = LoraConfig(r=1, target_modules=["lm_head"])
    tied = get_peft_model(tiny(tie_word_embeddings=True), config)
    with pytest.raises(ConfigurationError, match="ties and a server holds once"):
        opened(tied, stubs)


def test_a_failure_without_a_text_is_named_by_its_kind(student, stubs, monkeypatch):
    def fail(*arguments, **options):
        raise httpx.ReadTimeout("")

    monkeypatch.setattr(httpx, "post", fail)
    with opened(student, stubs) as both, pytest.raises(RolloutServerError, match="ReadTimeout"):
        both.sync(0)

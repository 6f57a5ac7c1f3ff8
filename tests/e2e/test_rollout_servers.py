"""Student completions by real, stock vLLM servers on CPU, which get its weights over gloo."""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from shared.errors import RolloutServerError
from student_trainer.rollouts import NO_FILTER, RolloutServers, ServerOptions, TokenFilter
from student_trainer.rollouts.sampling import filter_logits
from tests.e2e.test_distillation import flags, history
from tests.e2e.test_vllm_rollouts import (
    STOPS,
    VOCAB_SIZE,
    assert_proposes_its_top_tokens,
    requests,
    save_student,
    step,
)
from tests.support import trainer_process
from tests.support.server import free_port, running_rollout_server
from tests.support.trainer_process import assert_same_weights, checkpoints
from tests.support.vllm import VLLM

pytestmark = VLLM
LONGEST = 64
FILTER = TokenFilter(top_p=0.8, top_k=40, min_p=0.1)


@pytest.fixture(scope="module")
def student_folder(tmp_path_factory):
    return save_student(tmp_path_factory.mktemp("student"))


@pytest.fixture
def student(student_folder):
    return AutoModelForCausalLM.from_pretrained(student_folder, dtype=torch.float32)


class Replicas:
    """Two servers that can be killed and started again at their addresses; one loads adapters."""

    def __init__(self, folder, logs):
        self._folder, self._logs = folder, logs
        self.ports = (free_port(), free_port())
        self.urls = tuple(f"http://127.0.0.1:{port}" for port in self.ports)
        self._running = contextlib.ExitStack()
        self.processes = [None, None]

    def start(self, *which):
        with ThreadPoolExecutor() as pool:
            list(pool.map(self._start, which))

    def kill(self, number):
        self.signal(signal.SIGKILL, number)

    def signal(self, number, *which):
        for one in which:
            server = psutil.Process(self.processes[one].pid)
            for process in [server, *server.children(recursive=True)]:  # its engine too
                process.send_signal(number)

    def close(self):
        self._running.close()

    def _start(self, number):
        log = self._logs / f"server-{number}.log"
        server = running_rollout_server(
            self._folder, port=self.ports[number], log=log, lora_rank=8 if number == 1 else None
        )
        self.processes[number] = self._running.enter_context(server)


@pytest.fixture(scope="module")
def replicas(student_folder, tmp_path_factory):
    both = Replicas(student_folder, tmp_path_factory.mktemp("logs"))
    with contextlib.closing(both):
        both.start(0, 1)
        yield both


@contextlib.contextmanager
def servers(student, urls, **options):
    with RolloutServers(
        student, ServerOptions(urls, "gloo", **options), dtype="float32", longest=LONGEST
    ) as opened:
        yield opened


def write(opened, count=12, *, temperature=1.0, max_new_tokens=24, token_filter=NO_FILTER):
    engine = opened.rollouts(
        stop_ids=STOPS, max_new_tokens=max_new_tokens, temperature=temperature,
        vocab_size=VOCAB_SIZE, token_filter=token_filter,
    )  # fmt: skip
    written = dict(item for group in engine.generate(requests(count)) for item in group)
    return [written[i].token_ids.tolist() for i in range(count)]


def assert_left(student, written):
    """Check that each token is one that `FILTER` leaves the student itself."""
    for request, ids in zip(requests(len(written)), written, strict=True):
        whole = torch.tensor([[*request.prompt_ids.tolist(), *ids]])
        with torch.no_grad():
            rows = student(input_ids=whole).logits[0, len(request.prompt_ids) - 1 : -1]
        left = filter_logits(rows.float(), FILTER).isfinite()
        assert left[torch.arange(len(ids)), torch.tensor(ids)].all()


def test_each_replica_writes_the_same_with_each_version_of_the_weights(student, replicas):
    written = []
    with servers(student, replicas.urls) as both:
        for version in range(2):
            both.sync(version)
            assert both.drift < 1e-5
            together, filtered = write(both), write(both, token_filter=FILTER)
            assert filtered != together
            assert_left(student, filtered)
            for url in replicas.urls:
                both.live = [url]
                assert write(both) == together
                assert write(both, token_filter=FILTER) == filtered
            both.options = replace(both.options, max_tokens_in_flight=60)
            both.live = list(replicas.urls)
            assert write(both) == together
            both.options = replace(both.options, max_tokens_in_flight=None)
            written.append(together)
            step(student, seed=version)
    assert written[0] != written[1]


def test_completions_bring_the_students_most_probable_ids(student, replicas):
    with servers(student, replicas.urls) as both:
        both.sync(0)
        engine = both.rollouts(
            stop_ids=STOPS, max_new_tokens=16, temperature=1.0, vocab_size=VOCAB_SIZE,
            student_top_m=16,
        )  # fmt: skip
        assert_proposes_its_top_tokens(engine, student, requests(6))


def test_adapters_are_merged_and_a_version_that_is_there_is_not_sent_again(student, replicas):
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    adapted = get_peft_model(student, config)
    with servers(adapted, replicas.urls) as both:
        both.sync(5)
        assert both.drift < 1e-5
        step(adapted, seed=1)
        both.sync(5)
        before = write(both)
        both.sync(6)
        assert both.drift < 1e-5
        assert write(both) != before


def test_a_server_that_loads_adapters_gets_them_alone_and_writes_the_same(
    student, replicas, caplog
):
    config = LoraConfig(
        r=2, rank_pattern={"q_proj": 4}, alpha_pattern={"o_proj": 3}, use_rslora=True,
        target_modules="all-linear", init_lora_weights=False,
    )  # fmt: skip
    adapted = get_peft_model(student, config)
    with servers(adapted, replicas.urls) as merged, servers(adapted, replicas.urls[1:]) as alone:
        for version in range(2):
            merged.sync(version)
            expected, whole = write(merged), merged.sent_bytes
            alone.sync(version)
            assert alone.drift < 1e-5
            assert write(alone) == expected
            move_adapters(adapted, seed=version)
        alone.sync(2)
        assert alone.adapter is not None
        assert merged.adapter is None
        assert write(alone) != expected
        assert alone.sent_bytes < whole / 4
        folder = adapters_folder(alone)
        assert [path.name for path in folder.iterdir()] == [alone.adapter]
    assert not folder.exists()
    assert sum("without --enable-lora" in message for message in caplog.messages) == 1


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"r": 16}, "max-lora-rank 8, below 16"),
        ({"use_dora": True}, "DoRA"),
        ({"target_modules": ["embed_tokens"]}, "embed_tokens is no linear layer"),
    ],
    ids=["rank", "dora", "embedding"],
)
def test_adapters_that_a_server_does_not_load_are_merged(student, replicas, caplog, options, why):
    student.config.tie_word_embeddings = False
    settings = {"r": 2, "target_modules": "all-linear", "init_lora_weights": False, **options}
    with servers(get_peft_model(student, LoraConfig(**settings)), replicas.urls[1:]) as one:
        one.sync(0)
        assert one.drift < 1e-5
        assert one.adapter is None
    assert any(why in message for message in caplog.messages)


def move_adapters(adapted, seed):
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter += 0.1 * torch.randn_like(parameter)


def adapters_folder(opened):
    return Path(tempfile.gettempdir()) / f"sparse-gkd-adapters-{opened.adapter.partition('-')[0]}"


def test_greedy_completions_are_those_of_the_model_and_end_as_they_should(student, replicas):
    with servers(student, replicas.urls) as both:
        both.sync(0)
        written = write(both, temperature=0.0)
    for request, ids in zip(requests(12), written, strict=True):
        whole = torch.tensor([[*request.prompt_ids.tolist(), *ids]])
        chosen = student(input_ids=whole).logits[0, len(request.prompt_ids) - 1 : -1]
        assert chosen.argmax(-1).tolist() == ids
        assert not set(ids[:-1]) & set(STOPS)


def test_a_caller_that_stops_early_leaves_nothing_running(student, replicas):
    with servers(student, replicas.urls[:1]) as one:
        one.sync(0)
        engine = one.rollouts(
            stop_ids=[], max_new_tokens=200, temperature=1.0, vocab_size=VOCAB_SIZE
        )
        next(iter(engine.generate(requests(40))))
        one.sync(1)  # would wait for what runs
        running = httpx.get(f"{replicas.urls[0]}/metrics").text
    assert "vllm:num_requests_running" in running
    assert all(
        line.endswith(" 0.0")
        for line in running.splitlines()
        if line.startswith(("vllm:num_requests_running", "vllm:num_requests_waiting{"))
    )


def test_a_server_that_has_other_weights_is_not_believed(student, replicas):
    with servers(student, replicas.urls) as both:
        both.sync(0)
        alone = write(both)
        httpx.post(f"{replicas.urls[0]}/update_weight_version", json={"new_version": "other"})
        assert write(both) == alone
        assert both.live == [replicas.urls[1]]
        httpx.post(f"{replicas.urls[1]}/update_weight_version", json={"new_version": "other"})
        with pytest.raises(RolloutServerError, match="no rollout server is left"):
            write(both)


def on_policy(world, output, student, urls, **options):
    settings = {
        "model_name_or_path": student, "teacher_url": world.url, "top_k_logprobs": 16,
        "lmbda": 1, "beta": 0, "max_steps": 6, "save_strategy": "steps", "save_steps": 2,
        "rollout_timeout": 5, **options,
    }  # fmt: skip
    return ["distill", *flags(world, output, **settings), "--rollout_url", *urls]


def divergences(output):
    return [row["train/divergence"] for row in history(output) if "train/divergence" in row]


def test_two_sharded_ranks_learn_what_one_process_learns(world, student_folder, replicas, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    trainer_process.train(on_policy(world, one, student_folder, replicas.urls))
    argv = on_policy(world, two, student_folder, replicas.urls, per_device_train_batch_size=4)
    trainer_process.train_on_two_ranks([*argv, "--fsdp"])
    assert (two / "checkpoint-6" / "pytorch_model_fsdp.bin").exists()  # it was sharded
    np.testing.assert_allclose(divergences(one), divergences(two), rtol=1e-4)


def test_two_sharded_ranks_that_send_adapters_learn_what_merged_weights_teach(
    world, student_folder, replicas, tmp_path
):
    lora = {"use_peft": True, "lora_r": 4, "learning_rate": 1e-2}
    merged, alone = tmp_path / "merged", tmp_path / "alone"
    trainer_process.train(on_policy(world, merged, student_folder, replicas.urls, **lora))
    argv = on_policy(
        world, alone, student_folder, replicas.urls[1:], per_device_train_batch_size=4, **lora
    )
    trainer_process.train_on_two_ranks([*argv, "--fsdp"])
    np.testing.assert_allclose(divergences(merged), divergences(alone), rtol=1e-4)
    sent = [
        [row["train/rollout_bytes"] for row in history(output) if "train/rollout_bytes" in row]
        for output in (merged, alone)
    ]
    assert max(sent[1][1:]) < min(sent[0]) / 4


@pytest.mark.parametrize("staleness", [0, 1])
def test_killed_servers_change_nothing(world, student_folder, replicas, tmp_path, staleness):
    """One dies and the other goes on; then that dies too, and a resumed run ends the same."""
    options = {"rollout_staleness": staleness}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    trainer_process.train(on_policy(world, whole, student_folder, replicas.urls, **options))

    argv = on_policy(world, killed, student_folder, replicas.urls, max_steps=6, **options)
    live = killed / "_log_history.jsonl"
    with trainer_process.running(argv) as trainer:
        trainer_process.until_logged(live, 2)
        replicas.kill(1)
        trainer_process.until_logged(live, 4)
        replicas.kill(0)
        trainer.join(120)
        assert trainer.exitcode == 1
    assert checkpoints(killed)[-1] >= 2
    replicas.start(0, 1)
    trainer_process.train([*argv, "--resume_from_checkpoint", "auto"])
    assert_same_weights(whole, killed)


def test_servers_that_hang_are_passed_over_and_a_told_run_ends_in_seconds(
    world, student_folder, replicas, tmp_path
):
    """One stops while its connections stay open, the other goes on; then that stops too."""
    whole, hung = tmp_path / "whole", tmp_path / "hung"
    trainer_process.train(on_policy(world, whole, student_folder, replicas.urls))

    options = {"save_steps": 100, "rollout_timeout": 3}
    argv = on_policy(world, hung, student_folder, replicas.urls, **options)
    live = hung / "_log_history.jsonl"
    with trainer_process.running(argv) as trainer:
        try:
            trainer_process.until_logged(live, 1)
            replicas.signal(signal.SIGSTOP, 1)
            trainer_process.until_logged(live, 3)
            replicas.signal(signal.SIGSTOP, 0)
            began = time.monotonic()
            os.kill(trainer.pid, signal.SIGTERM)
            trainer.join(60)
            assert trainer.exitcode == 0
            assert time.monotonic() - began < 30
        finally:
            replicas.signal(signal.SIGCONT, 0, 1)
    assert 0 < checkpoints(hung)[-1] < 6
    trainer_process.train([*argv, "--resume_from_checkpoint", "auto"])
    assert_same_weights(whole, hung)


def test_a_server_that_hangs_while_it_takes_weights_is_left_out(student, replicas):
    with servers(student, replicas.urls, seconds=3.0) as both:
        both.sync(0)
        written = write(both)
        send = both._transfer.send

        def stop_and_send():
            replicas.signal(signal.SIGSTOP, 1)
            send()

        both._transfer.send = stop_and_send
        try:
            began = time.monotonic()
            both.sync(1)
            assert time.monotonic() - began < 40
            assert both.live == [replicas.urls[0]]
            assert write(both) == written
        finally:
            replicas.signal(signal.SIGCONT, 1)


def test_a_server_of_another_model_is_refused(student, replicas):
    """The last test: such a server must be started again."""
    student.config.vocab_size += 1
    grown = torch.nn.Parameter(torch.zeros(student.config.vocab_size, 16))
    student.get_output_embeddings().weight = grown
    with (
        servers(student, replicas.urls[:1]) as one,
        pytest.raises(RolloutServerError, match=r"3 attempts.*start the servers again"),
    ):
        one.sync(0)

"""The student's completions by a real vLLM engine beside the trainer, on CPU."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from functools import partial
from types import SimpleNamespace
from unittest import mock

import numpy as np
import psutil
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from peft import LoraConfig, get_peft_model
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from shared.errors import ConfigurationError, RolloutError
from shared.text import StopSearch, StopStrings, completion_text
from student_trainer.rollouts import (
    NO_FILTER,
    RolloutRequest,
    TokenFilter,
    TransformersRollouts,
    VllmEngine,
    VllmRollouts,
)
from student_trainer.rollouts.engine_environment import rank_environment
from student_trainer.rollouts.sampling import filter_logits
from student_trainer.rollouts.weights import StudentWeights
from tests.e2e.test_distillation import flags, history
from tests.support import forked, trainer_process
from tests.support.http import until
from tests.support.models import save_model, save_tokenizer
from tests.support.trainer_process import assert_same_weights, checkpoints
from tests.support.vllm import VLLM, forked_engines

VOCAB_SIZE, STOPS, LONGEST = 260, range(1, 9), 24


def save_student(folder):
    save_tokenizer(folder)
    save_model(folder, head_dim=32, hidden_size=16, seed=1)  # smaller heads vLLM cannot do
    return folder


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    folder = save_student(tmp_path_factory.mktemp("student"))
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def vllm(student):
    with forked_engines(), VllmEngine(student, max_model_len=256, dtype="float32") as engine:
        yield engine


def rollouts(
    vllm, *, temperature=1.0, vocab_size=VOCAB_SIZE, max_new_tokens=LONGEST, stops=None,
    token_filter=NO_FILTER,
):  # fmt: skip
    return VllmRollouts(
        vllm, stop_ids=STOPS, max_new_tokens=max_new_tokens, temperature=temperature,
        vocab_size=vocab_size, stop_strings=stops, token_filter=token_filter,
    )  # fmt: skip


def requests(count, length=6):
    rng = np.random.default_rng(0)
    return [
        RolloutRequest(rng.integers(10, VOCAB_SIZE, length).astype(np.uint32), (5, i))
        for i in range(count)
    ]


def run(engine, asked):
    written = dict(item for group in engine.generate(asked) for item in group)
    return [written[i].token_ids.tolist() for i in range(len(asked))]


def assert_proposes_its_top_tokens(engine, student, asked):
    """Each rollout proposes the student's most probable ids, as its own forward pass ranks them."""
    for index, rollout in (item for group in engine.generate(asked) for item in group):
        prompt = asked[index].prompt_ids.astype(np.int64)
        whole = np.concatenate([prompt, rollout.token_ids.astype(np.int64)])
        with torch.no_grad():
            logits = student(torch.from_numpy(whole)[None]).logits[0, len(prompt) - 1 : -1]
        logits = logits[:, :VOCAB_SIZE]
        proposed = torch.from_numpy(rollout.proposed.astype(np.int64))  # [T, m]
        best = logits.topk(proposed.shape[1]).values
        assert torch.allclose(logits.gather(1, proposed), best, atol=1e-4)
        assert all(len(set(row)) == len(row) for row in proposed.tolist())


def step(student, seed):
    """Weights move, as in an optimizer's step."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += 0.05 * torch.randn_like(parameter)


def largest_difference(vllm, student, prompt):
    """Return how far vLLM's log-probs are from those of the trainer's forward pass."""
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=LONGEST, seed=1, logprobs=0, detokenize=False)
    [(_, written)] = vllm.run([prompt], [params])
    ids = torch.tensor([[*prompt, *written.token_ids]])
    with torch.no_grad():
        logprobs = student(ids).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]
    theirs = [row[i].logprob for row, i in zip(written.logprobs, written.token_ids, strict=True)]
    ours = logprobs.gather(1, ids[0, len(prompt) :, None])[:, 0]
    return float((ours - torch.tensor(theirs)).abs().max())


class TestEngine:
    pytestmark = VLLM

    def test_after_a_sync_it_samples_from_the_trainers_present_weights(self, vllm, student):
        prompt = [10 + i % 250 for i in range(200)]  # longer than a block of the prefix cache
        vllm.sync(1)
        assert largest_difference(vllm, student, prompt) < 1e-4
        assert vllm.drift < 1e-4
        step(student, seed=1)
        assert largest_difference(vllm, student, prompt) > 0.1
        vllm.sync(2)
        assert largest_difference(vllm, student, prompt) < 1e-4

    def test_weights_that_do_not_arrive_are_found_out(self, vllm, student, monkeypatch):
        vllm.sync(5)
        step(student, seed=3)
        with monkeypatch.context() as patch:
            patch.setattr(vllm._engine, "collective_rpc", lambda *words, **more: None)
            with pytest.raises(RolloutError, match="differ by"):
                vllm.sync(6)
        assert vllm.drift > 0.01
        vllm.sync(7)
        assert vllm.drift < 1e-4

    def test_the_same_version_is_not_sent_again(self, vllm, student):
        vllm.sync(10)
        before = run(rollouts(vllm, temperature=0.0), requests(4))
        step(student, seed=2)
        vllm.sync(10)
        assert run(rollouts(vllm, temperature=0.0), requests(4)) == before
        vllm.sync(11)
        assert run(rollouts(vllm, temperature=0.0), requests(4)) != before

    def test_greedy_writes_what_the_student_itself_writes(self, vllm, student):
        vllm.sync(20)
        itself = TransformersRollouts(
            student, stop_ids=STOPS, pad_token_id=0, max_new_tokens=LONGEST, temperature=0.0,
            batch_size=None, vocab_size=VOCAB_SIZE,
        )  # fmt: skip
        asked = requests(8)
        assert run(rollouts(vllm, temperature=0.0), asked) == run(itself, asked)

    def test_completions_bring_the_students_most_probable_ids(self, vllm, student):
        vllm.sync(25)
        engine = VllmRollouts(
            vllm, stop_ids=STOPS, max_new_tokens=LONGEST, temperature=1.0, vocab_size=VOCAB_SIZE,
            student_top_m=24,  # more than vLLM allows by default
        )  # fmt: skip
        assert_proposes_its_top_tokens(engine, student, requests(6))

    def test_completions_leave_one_by_one_and_end_with_a_stop_token(self, vllm):
        written = [item for group in rollouts(vllm).generate(requests(24)) for item in group]
        assert sorted(index for index, _ in written) == list(range(24))
        lengths = [len(rollout.token_ids) for _, rollout in written]
        assert len(set(lengths)) > 3
        assert max(lengths[:8]) < min(lengths[-8:])  # those between began a token apart
        for _, rollout in written:
            stops = [i for i, token in enumerate(rollout.token_ids) if token in STOPS]
            assert stops == ([] if rollout.truncated else [len(rollout.token_ids) - 1])
            assert not rollout.truncated or len(rollout.token_ids) == LONGEST

    def test_stop_strings_end_completions_where_the_student_itself_ends_them(
        self, vllm, student, tmp_path
    ):
        save_tokenizer(tmp_path)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path)
        asked = requests(8)
        whole = dict(item for group in rollouts(vllm).generate(asked) for item in group)
        texts = [
            completion_text(tokenizer, asked[i].prompt_ids, whole[i].token_ids) for i in range(8)
        ]
        stops = StopStrings(tuple(text[3:5] for text in texts if len(text) > 5))
        search = partial(StopSearch, tokenizer, stops=stops)
        early = dict(
            item for group in rollouts(vllm, stops=search).generate(asked) for item in group
        )
        for i in range(8):
            ids, looking = whole[i].token_ids, search(asked[i].prompt_ids)
            end = next((t + 1 for t, token in enumerate(ids) if looking.add(token)), None)
            assert early[i].token_ids.tolist() == ids[:end].tolist()
            assert early[i].truncated == (whole[i].truncated and end is None)
        assert sum(len(r.token_ids) for r in early.values()) < sum(
            len(r.token_ids) for r in whole.values()
        )

    @pytest.mark.parametrize(("count", "length"), [(8, 6), (60, 200)], ids=["whole", "in pieces"])
    def test_the_same_key_gives_the_same_completion_whatever_the_batch(self, vllm, count, length):
        asked = requests(count, length)
        together = run(rollouts(vllm), asked)
        assert together == run(rollouts(vllm), asked[::-1])[::-1]
        assert together != run(
            rollouts(vllm), [RolloutRequest(r.prompt_ids, ("other", *r.key)) for r in asked]
        )

    @pytest.mark.parametrize(
        "token_filter",
        [NO_FILTER, TokenFilter(top_p=0.7), TokenFilter(top_k=20), TokenFilter(0.8, 60, 0.3)],
        ids=["whole", "top-p", "top-k", "all filters"],
    )
    def test_samples_follow_the_softmax_at_the_temperature(self, vllm, student, token_filter):
        """And with filters the same tokens are left as for the student itself, no others."""
        vllm.sync(30)
        prompt = np.array([15, 16, 17], dtype=np.uint32)
        asked = [RolloutRequest(prompt, (9, i)) for i in range(3000)]
        one = {"temperature": 1.5, "max_new_tokens": 1, "token_filter": token_filter}
        tokens = [ids[0] for ids in run(rollouts(vllm, **one), asked)]
        counts = np.bincount(tokens, minlength=VOCAB_SIZE)
        with torch.no_grad():
            logits = student(torch.tensor([[15, 16, 17]])).logits[:, -1].float() / 1.5
        left = filter_logits(logits, token_filter)[0]
        expected = left.softmax(-1).double().numpy() * len(asked)
        assert counts[expected == 0].sum() == 0
        counts, expected = counts[expected >= 5], expected[expected >= 5]
        chi_square, degrees = ((counts - expected) ** 2 / expected).sum(), len(expected)
        assert chi_square < degrees + 5 * np.sqrt(2 * degrees)

    def test_ids_outside_the_shared_vocabulary_are_not_sampled(self, vllm):
        written = run(rollouts(vllm, temperature=2.0, vocab_size=40), requests(20))
        assert max(max(ids) for ids in written) in range(30, 40)

    def test_an_engine_that_is_killed_ends_what_it_was_writing(self, vllm):  # so it is the last
        endless = VllmRollouts(
            vllm, stop_ids=[], max_new_tokens=240, temperature=1.0, vocab_size=VOCAB_SIZE
        )
        [core] = [p for p in psutil.Process().children() if "EngineCore" in p.name()]
        threading.Timer(0.5, core.kill).start()
        with pytest.raises(RolloutError, match="engine is dead"):
            run(endless, requests(64))
        with pytest.raises(RolloutError, match="engine is dead"):
            vllm.sync(40)


class RecordedEngine:
    """A stand-in for vLLM's engine that writes token 5 and keeps what it is called with."""

    def __init__(self, student):
        self.calls = []
        self._waiting = []
        self._student = student
        self.engine_core = SimpleNamespace(
            shutdown=lambda: None, resources=SimpleNamespace(engine_dead=False)
        )

    def collective_rpc(self, method, kwargs=None):
        if self.calls[-1:] != [method]:  # a layer after the other
            self.calls.append(method)

    def wake_up(self, tags):
        self.calls.append(f"wake {tags}")

    def sleep(self, level):
        self.calls.append(f"sleep {level}")

    def reset_prefix_cache(self):
        self.calls.append("drop cache")
        return True

    def add_request(self, name, prompt, params):
        self.calls.append("write")
        self._waiting.append((name, prompt["prompt_token_ids"]))

    def step(self):
        name, prompt = self._waiting.pop()
        with torch.no_grad():
            row = self._student(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
        logprobs = [{5: SimpleNamespace(logprob=float(row[5]))}]
        written = SimpleNamespace(token_ids=[5], logprobs=logprobs, finish_reason="stop")
        return [SimpleNamespace(request_id=name, finished=True, outputs=[written])]


LOAD = ["begin_weights", "load_weights_of", "finish_weights"]


class TestSleep:
    pytestmark = VLLM

    @pytest.fixture
    def recorded(self, student, monkeypatch):
        import vllm

        engine = RecordedEngine(student)
        made = SimpleNamespace(from_engine_args=lambda arguments: engine)
        monkeypatch.setattr(vllm, "LLMEngine", made)
        monkeypatch.setattr(vllm, "EngineArgs", lambda **options: None)
        return engine

    def test_it_wakes_in_two_parts_around_its_weights_and_sleeps_once_it_has_written(
        self, student, recorded, monkeypatch
    ):
        from vllm.platforms import current_platform

        monkeypatch.setattr(current_platform, "is_sleep_mode_available", lambda: True)
        awake = ["wake ['weights']", *LOAD, "wake ['kv_cache']", "drop cache", "write"]
        with VllmEngine(student, max_model_len=64, dtype="float32", sleeps=True) as engine:
            assert recorded.calls == ["spare_generators", "sleep 2"]
            for _ in range(2):  # of one version too: asleep, it holds no weights
                recorded.calls.clear()
                engine.sync(1)
                assert recorded.calls == awake
                assert run(rollouts(engine), requests(2)) == [[5], [5]]
                assert recorded.calls == [*awake, "write", "write", "sleep 2"]

    def test_one_that_does_not_sleep_is_told_nothing_of_it(self, student, recorded):
        with VllmEngine(student, max_model_len=64, dtype="float32") as engine:
            for _ in range(2):
                engine.sync(1)
                run(rollouts(engine), requests(1))
        assert recorded.calls == ["spare_generators", *LOAD, "drop cache", *3 * ["write"]]

    @pytest.mark.skipif(torch.cuda.is_available(), reason="vLLM sleeps on GPUs")
    def test_where_vllm_cannot_sleep_it_is_refused(self, student):
        with pytest.raises(ConfigurationError, match="vLLM cannot sleep on cpu; drop it"):
            VllmEngine(student, max_model_len=64, dtype="float32", sleeps=True)


def rank_of_two(rank, folder, store, results):
    """Write with a sharded student, before and after its weights move, from an engine for two."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    student = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    options = {"max_model_len": 64, "dtype": "float32", "tensor_parallel_size": 2}
    found = []
    # Not forked from here, whose process group vLLM would take for its own.
    clean = multiprocessing.get_context("forkserver")
    clean.set_forkserver_preload([forked.PRELOADED_VLLM])
    starts = mock.patch("vllm.v1.engine.utils.get_mp_context", return_value=clean)
    with starts, VllmEngine(student, **options) as engine:
        for layer in student.model.layers:  # once the engine is there, as the trainer does
            fully_shard(layer)
        fully_shard(student)
        for version in range(2):
            engine.sync(version)
            found.append((engine.drift, run(rollouts(engine, temperature=0.0), requests(3 + rank))))
            student.reshard()  # as after a backward pass
            with torch.no_grad():
                for parameter in student.parameters():
                    parameter.mul_(1.5)
    dist.barrier()
    results[rank] = found
    dist.destroy_process_group()


class TestSharedEngine:
    pytestmark = VLLM

    def test_two_sharded_ranks_write_what_the_whole_student_writes(self, tmp_path):
        folder = save_student(tmp_path / "student")
        with forked.CONTEXT.Manager() as manager:
            results = manager.dict()
            arguments = (folder, str(tmp_path / "store"), results)
            mp.start_processes(rank_of_two, arguments, nprocs=2, start_method=forked.METHOD)
            ranks = [results[0], results[1]]
        student = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        itself = TransformersRollouts(
            student, stop_ids=STOPS, pad_token_id=0, max_new_tokens=LONGEST, temperature=0.0,
            batch_size=None, vocab_size=VOCAB_SIZE,
        )  # fmt: skip
        for version in range(2):
            for rank, found in enumerate(ranks):
                drift, written = found[version]
                assert drift < 1e-4
                assert written == run(itself, requests(3 + rank))
            with torch.no_grad():
                for parameter in student.parameters():
                    parameter.mul_(1.5)


def on_policy(world, output, student, **options):
    settings = {
        "model_name_or_path": student, "teacher_url": world.url, "top_k_logprobs": 16,
        "lmbda": 1, "beta": 0, "max_steps": 6, "save_strategy": "steps", "save_steps": 2,
        "rollout_engine": "vllm", **options,
    }  # fmt: skip
    return ["distill", *flags(world, output, **settings)]


def divergences(output):
    return [row["train/divergence"] for row in history(output) if "train/divergence" in row]


class TestDistillation:
    pytestmark = VLLM

    @pytest.mark.parametrize(
        ("ranks", "staleness", "adapters"),
        [(2, 0, {}), (1, 1, {"use_peft": "true", "lora_r": 4})],
        ids=["an engine on each of two ranks", "adapters, a step behind"],
    )
    def test_on_policy_steps_learn_from_vllms_completions(
        self, world, tmp_path, ranks, staleness, adapters
    ):
        words = flags(
            world, tmp_path / "out", model_name_or_path=save_student(tmp_path / "student"),
            teacher_url=world.url, top_k_logprobs=16, lmbda=1, beta=0, max_steps=30,
            rollout_engine="vllm", rollout_staleness=staleness,
            per_device_train_batch_size=8 // ranks, **adapters,
        )  # fmt: skip
        train = trainer_process.train if ranks == 1 else trainer_process.train_on_two_ranks
        train(["distill", *words])
        logged = [entry for entry in history(tmp_path / "out") if "train/divergence" in entry]
        assert max(entry["train/rollout_drift"] for entry in logged) < 1e-4
        assert [entry["train/staleness"] for entry in logged] == [0, *29 * [staleness]]
        assert logged[0]["train/divergence"] > 0
        last = np.mean([entry["train/divergence"] for entry in logged[-5:]])
        assert last < 0.9 * logged[0]["train/divergence"]

    def test_two_sharded_ranks_learn_what_one_process_learns(self, world, tmp_path):
        """With an engine each; and a resumed run ends with the same weights, to the last bit."""
        student = save_student(tmp_path / "student")
        one, two, resumed = (tmp_path / name for name in ("one", "two", "resumed"))
        trainer_process.train(on_policy(world, one, student))
        halves = {"per_device_train_batch_size": 4}
        trainer_process.train_on_two_ranks([*on_policy(world, two, student, **halves), "--fsdp"])
        assert (two / "checkpoint-6" / "pytorch_model_fsdp.bin").exists()  # it was sharded
        np.testing.assert_allclose(divergences(two), divergences(one), rtol=1e-4)
        again = on_policy(
            world, resumed, student, resume_from_checkpoint=two / "checkpoint-4", **halves
        )
        trainer_process.train_on_two_ranks([*again, "--fsdp"])
        assert_same_weights(two, resumed)

    def test_ctrl_c_in_a_terminal_leaves_the_engine_for_the_last_step(self, world, tmp_path):
        """Ctrl-C reaches all processes of the group at once, and vLLM's own ends at it."""
        argv = flags(
            world, tmp_path / "out", model_name_or_path=save_student(tmp_path / "student"),
            teacher_url=world.url, top_k_logprobs=16, lmbda=1, max_steps=100_000,
            rollout_engine="vllm", save_strategy="steps", save_steps=100_000,
        )  # fmt: skip
        with (tmp_path / "log").open("wb") as log:
            trainer = subprocess.Popen(
                [sys.executable, "-m", "student_trainer", "distill", *argv],
                stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        live = tmp_path / "out" / "_log_history.jsonl"
        try:
            until(lambda: live.exists() and len(live.read_text().splitlines()) > 3, 500)
            os.killpg(trainer.pid, signal.SIGINT)
            code = trainer.wait(120)
        finally:
            trainer.kill()
        assert code == 0, (tmp_path / "log").read_text()
        assert len(checkpoints(tmp_path / "out")) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU vLLM compiles")
def test_on_cpu_an_engine_compiles_nothing_and_the_trainer_may(monkeypatch):
    monkeypatch.delenv("TORCH_COMPILE_DISABLE", raising=False)
    with rank_environment([""]):
        assert os.environ["TORCH_COMPILE_DISABLE"] == "1"
    assert "TORCH_COMPILE_DISABLE" not in os.environ
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "0")
    with rank_environment([""]):
        assert os.environ["TORCH_COMPILE_DISABLE"] == "0"
    assert os.environ["TORCH_COMPILE_DISABLE"] == "0"


def test_tied_weights_are_sent_once():
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    weights = dict(StudentWeights(LlamaForCausalLM(config), torch.bfloat16))
    assert "model.embed_tokens.weight" in weights
    assert "lm_head.weight" not in weights
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}


def test_merged_weights_are_those_of_merge_and_unload(student):
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    torch.manual_seed(3)
    adapted = get_peft_model(student.__class__(student.config), config)
    weights = dict(StudentWeights(adapted, torch.float32))
    expected = adapted.merge_and_unload().state_dict()
    assert set(weights) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value, msg=name)

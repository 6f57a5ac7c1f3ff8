"""The backend around the engine: its flags, its fallback, and the public path's arithmetic."""

import asyncio
import logging
import math
import os

import numpy as np
import pytest

from shared.errors import ConfigurationError, InternalError, UnavailableError
from shared.protocol import ScoreSequence
from teacher_server.backends.base import GenerateJob, ScoreJob
from teacher_server.backends.vllm import LEAST_TAIL, VllmBackend, public_scores
from teacher_server.backends.vllm_engine import engine_arguments
from teacher_server.metrics import Metrics
from teacher_server.settings import Settings
from tests.support.models import save_model, save_tokenizer
from tests.support.reference import dense_logprobs, largest_error, load_model
from tests.support.vllm import VLLM, forked_engines


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    save_tokenizer(folder)
    save_model(folder, hidden_size=64, num_attention_heads=2, num_key_value_heads=1)
    return folder


def public_answer(dense, job):
    """Return vLLM's prompt log-probs: the next token, then the top k, [T, 1 + k]."""
    top = np.argsort(-dense, axis=1)[:, : job.top_k]
    following = job.token_ids[job.completion_start :].astype(np.int64)[:, None]
    ids = np.concatenate([following, top], axis=1)
    return ids.astype(np.uint32), np.take_along_axis(dense, ids, 1).astype(np.float32)


@pytest.mark.parametrize("top_k", [1, 5, 29, 30])
def test_the_public_path_gives_the_same_tail(top_k):
    rng = np.random.default_rng(top_k)
    logits = rng.normal(size=(9, 30))
    dense = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    job = ScoreJob(rng.integers(0, 30, 10).astype(np.uint32), 1, top_k)
    scores = public_scores(*public_answer(dense, job), job, 30)
    sequence = ScoreSequence(token_ids=job.token_ids, completion_start=1)
    assert largest_error(scores, dense, sequence) < 1e-4


def test_the_public_paths_tail_is_never_negative_mass():
    # float32 log-probs whose sum is above 1, as rounding makes them.
    logprobs = np.full((1, 3), math.log(0.5) + 1e-6, np.float32)
    job = ScoreJob(np.array([0, 1], np.uint32), 1, 2)
    scores = public_scores(np.array([[1, 1, 2]], np.uint32), logprobs, job, 30)
    assert scores.tail_logprob.tolist() == [np.float32(LEAST_TAIL)]
    assert np.exp(LEAST_TAIL) == pytest.approx(2**-24)
    full = public_scores(np.array([[1, 1, 2]], np.uint32), logprobs, job, 2)
    assert np.isneginf(full.tail_logprob).all()  # nothing else there is


def test_another_sequences_log_probs_are_refused():
    job = ScoreJob(np.array([0, 1], np.uint32), 1, 2)
    with pytest.raises(InternalError, match="not those of the tokens sent"):
        public_scores(np.array([[3, 1, 2]], np.uint32), np.zeros((1, 3), np.float32), job, 30)


class TestEngine:
    pytestmark = VLLM

    @pytest.fixture(autouse=True)
    def _environment(self):
        """Restore the variables that are set for the engine's processes."""
        before = dict(os.environ)
        yield
        os.environ.clear()
        os.environ.update(before)

    @pytest.mark.parametrize(("before", "after"), [(None, "1"), ("0", "0")], ids=["unset", "set"])
    def test_on_cpu_nothing_is_compiled_unless_it_is_wanted(self, folder, before, after):
        os.environ.pop("TORCH_COMPILE_DISABLE", None)
        if before is not None:
            os.environ["TORCH_COMPILE_DISABLE"] = before
        engine_arguments(Settings(str(folder), backend="vllm"))
        assert os.environ["TORCH_COMPILE_DISABLE"] == after

    def test_engine_flags_reach_the_engine_under_their_own_names(self, folder):
        arguments = engine_arguments(
            Settings(
                str(folder),
                backend="vllm",
                max_model_len=64,
                max_batch_tokens=512,
                engine_flags=(
                    *("--tensor-parallel-size", "2", "--pipeline-parallel-size", "3"),
                    *("--data-parallel-size", "4", "--quantization", "fp8"),
                    *("--gpu-memory-utilization", "0.7", "--no-enable-prefix-caching"),
                    "--max_num_seqs=17",
                ),
            )
        )
        found = {
            name: getattr(arguments, name)
            for name in (
                "tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size",
                "quantization", "gpu_memory_utilization", "enable_prefix_caching", "max_num_seqs",
                "max_model_len", "max_num_batched_tokens", "dtype", "trust_remote_code",
            )
        }  # fmt: skip
        assert found == {
            "tensor_parallel_size": 2,
            "pipeline_parallel_size": 3,
            "data_parallel_size": 4,
            "quantization": "fp8",
            "gpu_memory_utilization": 0.7,
            "enable_prefix_caching": False,
            "max_num_seqs": 17,
            "max_model_len": 64,
            "max_num_batched_tokens": 512,
            "dtype": "float32",  # the checkpoint's, which vLLM's own auto would halve
            "trust_remote_code": False,
        }

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (("--no-such-flag", "1"), "unrecognized arguments: --no-such-flag 1"),
            (("--tensor-parallel-size", "two"), "tensor-parallel-size.*invalid"),
            (("--worker-extension-cls", "x.Y"), "--worker-extension-cls is set by this server"),
        ],
    )
    def test_a_flag_that_vllm_does_not_take_is_refused(self, folder, flags, message):
        settings = Settings(str(folder), backend="vllm", engine_flags=flags)
        with pytest.raises(ConfigurationError, match=message):
            engine_arguments(settings)

    def test_another_device_than_vllms_own_is_refused(self, folder):
        with pytest.raises(ConfigurationError, match=r"--device cuda.* built for cpu"):
            engine_arguments(Settings(str(folder), backend="vllm", device="cuda"))

    def test_without_the_hooks_it_falls_back_to_public_log_probs(self, folder, monkeypatch, caplog):
        """A real engine whose workers know nothing of scoring."""
        monkeypatch.setattr("teacher_server.backends.vllm_engine._EXTENSION", "")
        settings = Settings(str(folder), backend="vllm", max_top_k=300)
        rng = np.random.default_rng(0)
        model = load_model(folder)

        async def run():
            loop = asyncio.get_running_loop()
            backend = await asyncio.to_thread(VllmBackend, settings, Metrics(), loop)
            jobs = [
                ScoreJob(rng.integers(0, 260, 30).astype(np.uint32), start, top_k)
                for start, top_k in ((1, 1), (9, 20), (29, 260))
            ]
            answers = await asyncio.gather(*map(backend.score, jobs))
            waiting = asyncio.create_task(
                backend.generate(GenerateJob(jobs[0].token_ids, 200, 0.0, 1.0, 0, (1,)))
            )
            await asyncio.sleep(0.1)
            await backend.close()
            with pytest.raises(UnavailableError, match="shutting down"):
                await waiting
            return backend.facts, jobs, answers

        with forked_engines(), caplog.at_level(logging.WARNING, logger="teacher_server"):
            facts, jobs, answers = asyncio.run(run())
        assert "falling back to its public prompt log-probs" in caplog.text
        capabilities = facts.capabilities
        assert (capabilities.temperature, capabilities.requested_token_ids) == (False, False)
        assert capabilities.generate
        for job, answer in zip(jobs, answers, strict=True):
            start = job.completion_start
            dense = dense_logprobs(model, job.token_ids, start, 1.0)
            sequence = ScoreSequence(token_ids=job.token_ids, completion_start=start)
            assert largest_error(answer, dense, sequence) < 2e-4

"""The teacher's scoring on the device: tokens a second, and how exact its log-probs are."""

from __future__ import annotations

import asyncio
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from benchmarks.gpu_parts import NotHereError
from benchmarks.gpu_parts.measure import Rows, median_seconds, milliseconds, ratio
from benchmarks.gpu_parts.models import build, config_of

TOP_K = 64
AIM_OVER_FORWARD = 0.8


def speed(device: str, *, shape: str, sequences: int = 16, length: int = 1024) -> Rows:
    """Yield the speed of the transformers backend, and of the bare forward pass.

    The bare pass computes the hidden states of all tokens and the logits of the completions, which
    nobody who scores can do without.
    """
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = build(config_of(shape), device, dtype).eval()
    jobs = _jobs(sequences, length, model.config.vocab_size)
    ids = torch.from_numpy(np.stack([job.token_ids.astype(np.int64) for job in jobs])).to(device)
    decoder, head = model.get_decoder(), model.get_output_embeddings()

    @torch.inference_mode()
    def bare() -> None:
        states = decoder(input_ids=ids, use_cache=False).last_hidden_state
        for some in states[:, length // 4 :].flatten(0, 1).split(256):
            torch.nn.functional.linear(some, head.weight)

    limit = median_seconds(bare, device, budget=3.0)
    with _Backend(model) as backend:
        taken = median_seconds(lambda: backend.score_batch(jobs), device, budget=3.0)
    tokens = sequences * length
    yield {"case": f"{shape}, {dtype}, bare forward pass".replace("torch.", ""),
           "ms": milliseconds(limit), "tokens/s": round(tokens / limit)}  # fmt: skip
    yield {"case": f"{shape}, {dtype}, transformers backend".replace("torch.", ""),
           "ms": milliseconds(taken), "tokens/s": round(tokens / taken),
           "of the bare": ratio(limit, taken), "aim": f"≥ {AIM_OVER_FORWARD}"}  # fmt: skip


def exactness(device: str, *, shape: str, layers: int = 4) -> Rows:
    """Yield the largest error of a log-prob, in nats.

    In float32 it is that of the whole model against float64. In bfloat16 a model's states are
    rounded, so it is that of the log-probs against a float64 output layer on the same states.
    """
    config = config_of(shape, num_hidden_layers=layers)
    jobs = _jobs(2, 128, config.vocab_size)
    ids = torch.from_numpy(np.stack([job.token_ids.astype(np.int64) for job in jobs])).to(device)
    for dtype in (torch.float32, torch.bfloat16):
        model = build(config, device, dtype).eval()
        with _Backend(model) as backend, torch.inference_mode():
            found = backend.score_batch(jobs)
            if dtype == torch.float32:
                logits = model.double()(input_ids=ids, use_cache=False).logits
            else:
                states = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
                logits = states.double() @ model.get_output_embeddings().weight.double().T
            logprobs = logits.log_softmax(dim=-1)
        worst = 0.0
        for job, scores, exact in zip(jobs, found, logprobs, strict=True):
            rows = exact[job.completion_start - 1 : -1]  # [T, V]
            named = torch.from_numpy(scores.token_ids.astype(np.int64)).to(device)
            tail = rows.scatter(1, named, -torch.inf)
            following = torch.from_numpy(job.token_ids.astype(np.int64)).to(device)
            tail = tail.scatter(1, following[job.completion_start :, None], -torch.inf)
            pairs = (
                (scores.logprobs, rows.gather(1, named)),
                (scores.tail_logprob, tail.logsumexp(dim=-1)),
            )
            for one, other in pairs:
                difference = torch.from_numpy(np.array(one)).to(device).double() - other
                worst = max(worst, float(difference.abs().max()))
        name = str(dtype).removeprefix("torch.")
        yield {"case": f"{shape}, {layers} layers, {name}", "largest error, nats": f"{worst:.1e}"}
        del model, logprobs, logits


def vllm(device: str, *, shape: str, sequences: int = 64, length: int = 1024) -> Rows:
    """Yield the speed of the vLLM backend, all sequences sent at once."""
    try:
        import vllm  # noqa: F401
    except ImportError as error:
        raise NotHereError("No module named 'vllm'") from error
    from tests.support.models import save_tokenizer

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_tokenizer(folder)
        build(config_of(shape), device, torch.bfloat16).save_pretrained(folder)
        torch.cuda.empty_cache()
        jobs = _jobs(sequences, length, config_of(shape).vocab_size)
        taken = asyncio.run(_score_by_vllm(str(folder), jobs))
    tokens = sequences * length
    yield {"case": f"{shape}, bfloat16, vLLM backend", "ms": milliseconds(taken),
           "tokens/s": round(tokens / taken)}  # fmt: skip


async def _score_by_vllm(folder: str, jobs: list[Any]) -> float:
    from teacher_server.backends.vllm import VllmBackend
    from teacher_server.metrics import Metrics
    from teacher_server.settings import Settings

    flags = ("--gpu-memory-utilization", "0.5", "--no-enable-prefix-caching")
    settings = Settings(model=folder, backend="vllm", dtype="bfloat16", engine_flags=flags)
    loop = asyncio.get_running_loop()
    backend = await asyncio.to_thread(VllmBackend, settings, Metrics(), loop)
    try:
        taken = []
        for _ in range(3):
            began = time.perf_counter()
            await asyncio.gather(*map(backend.score, jobs))
            taken.append(time.perf_counter() - began)
        return min(taken)
    finally:
        await backend.close()


class _Backend:
    """A `TransformersBackend` around a model in memory, with a small tokenizer of its own."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._folder = tempfile.TemporaryDirectory()

    def __enter__(self) -> Any:
        try:
            from teacher_server.backends import transformers as backends
            from teacher_server.metrics import Metrics
            from teacher_server.settings import Settings
            from tests.support.models import save_tokenizer
        except ImportError as error:
            raise NotHereError(str(error).splitlines()[0]) from error
        folder = Path(self._folder.name)
        save_tokenizer(folder)
        self._model.config.save_pretrained(folder)
        (folder / "model.safetensors").touch()  # the identity of weights that lie in memory
        settings = Settings(model=str(folder), backend="transformers", dtype="auto")
        with mock.patch.object(backends, "_load_model", return_value=self._model):
            return backends.TransformersBackend(settings, Metrics())

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()


def _jobs(sequences: int, length: int, vocab_size: int) -> list[Any]:
    """Return sequences of random tokens, whose last three quarters are to be scored."""
    try:
        from teacher_server.backends.base import ScoreJob
    except ImportError as error:
        raise NotHereError(str(error).splitlines()[0]) from error
    rng = np.random.default_rng(0)
    return [
        ScoreJob(rng.integers(0, vocab_size, length).astype(np.uint32), length // 4, TOP_K)
        for _ in range(sequences)
    ]

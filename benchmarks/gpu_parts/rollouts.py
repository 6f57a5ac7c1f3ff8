"""The student's completions on the device, by the trainer's own engine and by vLLM."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from benchmarks.gpu_parts import NotHereError
from benchmarks.gpu_parts.measure import Row, Rows, ratio
from benchmarks.gpu_parts.models import build, config_of
from benchmarks.gpu_parts.roofline import card_named


def transformers(device: str, *, shape: str, prompts: int = 64, new_tokens: int = 128) -> Rows:
    """Yield the speed of `TransformersRollouts`, and of its steps against reading the weights."""
    try:
        from student_trainer.rollouts.transformers import TransformersRollouts
    except ImportError as error:
        raise NotHereError(str(error).splitlines()[0]) from error
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = build(config_of(shape), device, dtype)
    engine = TransformersRollouts(
        model, stop_ids=[1], pad_token_id=0, max_new_tokens=new_tokens, temperature=1.0,
        batch_size=None, vocab_size=model.config.vocab_size,
    )  # fmt: skip
    engine.prepare()
    row = _speed(engine, _requests(prompts, model.config.vocab_size), new_tokens)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    name = torch.cuda.get_device_name() if device == "cuda" else ""
    least = weights / card_named(name).bandwidth
    row["reading the weights, ms"] = round(1e3 * least, 3)
    yield {"case": f"{shape}, transformers engine, {prompts} prompts", "mode": engine._mode, **row}


def vllm(device: str, *, shape: str, prompts: int = 64, new_tokens: int = 128) -> Rows:
    """Yield the speed of `VllmRollouts`, and the time to give it new weights."""
    try:
        import vllm  # noqa: F401
    except ImportError as error:
        raise NotHereError("No module named 'vllm'") from error
    from student_trainer.rollouts.vllm import VllmEngine, VllmRollouts

    model = build(config_of(shape), device, torch.bfloat16)
    with VllmEngine(model, max_model_len=1024, dtype="bfloat16") as engine:
        began = time.perf_counter()
        engine.sync(1)
        synced = time.perf_counter() - began
        rollouts = VllmRollouts(
            engine, stop_ids=[1], max_new_tokens=new_tokens, temperature=1.0,
            vocab_size=model.config.vocab_size,
        )  # fmt: skip
        row = _speed(rollouts, _requests(prompts, model.config.vocab_size), new_tokens)
        row |= {"new weights, s": round(synced, 2), "drift, nats": engine.drift}
    yield {"case": f"{shape}, vLLM engine, {prompts} prompts", **row}


def vllm_asleep(device: str, *, shape: str, prompts: int = 64, new_tokens: int = 128) -> Rows:
    """Yield the GPU memory of an engine that sleeps, and the time until it has new weights."""
    try:
        import vllm  # noqa: F401
    except ImportError as error:
        raise NotHereError("No module named 'vllm'") from error
    if device != "cuda":
        raise NotHereError("vLLM sleeps on GPUs alone")
    from student_trainer.rollouts.vllm import VllmEngine

    model = build(config_of(shape), device, torch.bfloat16)
    before = _used()
    with VllmEngine(model, max_model_len=1024, dtype="bfloat16", sleeps=True) as engine:
        rollouts = engine.rollouts(
            stop_ids=[1], max_new_tokens=new_tokens, temperature=1.0,
            vocab_size=model.config.vocab_size,
        )  # fmt: skip
        for step in range(3):
            began = time.perf_counter()
            engine.sync(step)
            synced = time.perf_counter() - began
            awake = _used() - before
            written = list(rollouts.generate(_requests(prompts, model.config.vocab_size)))
            yield {
                "case": f"{shape}, vLLM asleep between steps, step {step}",
                "awake, GB": round(awake / 1e9, 2),
                "asleep, GB": round((_used() - before) / 1e9, 2),
                "awake with new weights, s": round(synced, 2),
                "drift, nats": engine.drift,
                "completions": len(written),
            }


def _used() -> int:
    """Return the bytes of the GPU's memory that all processes use."""
    free, total = torch.cuda.mem_get_info()
    return int(total - free)


def _requests(prompts: int, vocab_size: int) -> list[Any]:
    from student_trainer.rollouts.base import RolloutRequest

    rng = np.random.default_rng(0)
    return [
        RolloutRequest(rng.integers(2, vocab_size, rng.integers(32, 129)).astype(np.uint32), (0, i))
        for i in range(prompts)
    ]


def _speed(engine: Any, requests: Sequence[Any], new_tokens: int) -> Row:
    """Return tokens a second and milliseconds a token of the batch, after a pass to warm up."""
    list(engine.generate(requests[:2]))
    began = time.perf_counter()
    written = [one for group in engine.generate(requests) for _, one in group]
    taken = time.perf_counter() - began
    tokens = sum(len(one.token_ids) for one in written)
    return {"tokens/s": round(tokens / taken), "ms a step": ratio(1e3 * taken, new_tokens)}

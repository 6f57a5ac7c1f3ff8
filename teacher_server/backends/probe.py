"""Probe a model as it loads for effects of a batch neighbour, a later token or a cache."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import numpy as np
import torch

from shared.errors import ConfigurationError
from shared.rope import LengthDependentRope, length_dependent_rope
from teacher_server.backends.base import GenerateJob
from teacher_server.backends.generation import generate_completions

logger = logging.getLogger(__name__)

SHORT, LONG = 8, 32  # tokens of the sequence that is scored, and of its neighbour
# Lengths of the probe's left-padded prompts and of their completions, one of which ends early.
PROMPTS, BUDGETS = (6, 11, 5, 8), (4, 2, 5, 3)
# Largest relative error of the head's inputs. A wrong state or position is off by tens of percent,
# rounding in half precision by one to five. Logits would tell less, because their common part is
# rounded much more coarsely.
TOLERANCE, HALF_TOLERANCE = 1e-2, 2e-1

# Errors of a model with another structure, other arguments or a cache of its own.
_CANNOT_RUN = (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError)

States = Callable[[torch.Tensor], torch.Tensor]
Mode = Literal["batched", "alone", "uncached"]


# `student_trainer.model.probe` has this too, because `shared` imports no torch.
def same_states(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> bool:
    """Return whether states [n, d] agree up to the rounding of a model in ``dtype``.

    States that are not finite count as equal, because they tell nothing and each request is
    refused.
    """
    found, expected = found.float(), expected.float()
    finite = expected.isfinite().all(dim=0) & found.isfinite().all(dim=0)  # [d]
    found, expected = found[:, finite], expected[:, finite]
    wide = dtype in (torch.float32, torch.float64)
    tolerance = TOLERANCE if wide else HALF_TOLERANCE
    return bool((found - expected).norm() <= tolerance * expected.norm())


@torch.inference_mode()
def probe_causality(model: Any, name: str, states: States) -> None:
    """Refuse a model whose later tokens change earlier states, such as an encoder.

    Args:
        name: of the checkpoint, for the error.
        states: computes the head's inputs [B, L, d] of input ids [B, L], as scoring does.

    Raises:
        ConfigurationError: a changed last token changes what comes before it.
    """
    ids = _ids(model, SHORT)[None].repeat(2, 1)  # [2, L]
    ids[1, -1] = (ids[1, -1] + 1) % _output_size(model)
    one, other = states(ids[:1])[0, :-1], states(ids[1:])[0, :-1]  # [L - 1, d]
    if not same_states(other, one, model.dtype):
        kind = model.config.get_text_config().model_type
        raise ConfigurationError(
            f"{name}: a later token changes the scores of earlier ones, so this {kind} model is an "
            "encoder, not a causal language model; serve a causal one (is_decoder in its config)"
        )


@torch.inference_mode()
def probe_batching(
    model: Any, max_model_len: int, states: States
) -> tuple[Callable[[Sequence[int]], list[list[int]]], LengthDependentRope | None]:
    """Return a function that groups sequences, by their lengths, for common forward passes.

    Also return the rope, where sequences of up to ``max_model_len`` meet several sets of its
    frequencies. The rope is known from the config; any other effect is probed with a short sequence
    beside a longer one.
    """
    name = type(model).__name__
    rope = length_dependent_rope(model.config)
    if rope is not None and (rope.each_length or max_model_len > rope.original):
        if max_model_len > rope.original:
            logger.warning(
                "%s changes its positions with the longest sequence of a batch: those over %d "
                "tokens are computed apart from shorter ones",
                name,
                rope.original,
            )
        return rope.groups, rope
    short = _ids(model, SHORT)
    beside = _ids(model, min(LONG, max_model_len)).flip(0)[None].repeat(2, 1)  # [2, L]
    size = min(SHORT, beside.shape[1])
    beside[0] = 0
    beside[0, :size] = short[:size]
    alone = states(short[None, :size])[0]  # [n, d]
    if same_states(states(beside)[0, :size], alone, model.dtype):
        return lambda lengths: [list(range(len(lengths)))], None
    logger.warning(
        "%s scores a sequence otherwise beside a longer one: sequences are computed one by one",
        name,
    )
    return lambda lengths: [[index] for index in range(len(lengths))], None


def probe_generation(model: Any, pad: int, vocab_size: int) -> Mode | None:
    """Return the fastest mode to generate correct completions, found by generating a few.

    The modes are left-padded prompts of unlike lengths in one batch with a cache, each alone with a
    cache, and each alone without one. None where no mode gives the states of the model's plain
    forward pass.
    """
    errors = []
    name = type(model).__name__
    modes: tuple[Mode, ...] = ("batched", "alone", "uncached")
    for mode in modes:
        try:
            if _generates_correctly(model, mode, pad, vocab_size):
                break
            errors.append(f"{mode}: other states than alone")
        except torch.OutOfMemoryError:
            raise
        except _CANNOT_RUN as error:
            errors.append(f"{mode}: {type(error).__name__}: {error}")
    else:
        logger.warning(
            "%s (%s) does not generate right (%s): /v1/generate is refused; serve it by "
            "--backend vllm for that",
            name,
            model.config.get_text_config().model_type,
            "; ".join(" ".join(error.split())[:120] for error in errors),
        )
        return None
    if mode != "batched":
        logger.warning(
            "%s does not write in a batch what it writes alone: completions are generated one at "
            "a time%s",
            name,
            "" if mode == "alone" else ", without a cache",
        )
    return mode


@torch.inference_mode()
def _generates_correctly(model: Any, mode: Mode, pad: int, vocab_size: int) -> bool:
    ids = _ids(model, sum(PROMPTS), vocab_size).cpu().numpy().astype(np.uint32)
    prompts = np.split(ids, np.cumsum(PROMPTS)[:-1])
    jobs = [
        GenerateJob(prompt, budget, 0.0, 1.0, 0, (index,))
        for index, (prompt, budget) in enumerate(zip(prompts, BUDGETS, strict=True))
    ]
    groups = [list(range(len(jobs)))] if mode == "batched" else [[i] for i in range(len(jobs))]
    for group in groups:
        waiting = [True] * len(group)
        written: dict[int, Any] = {}
        with _head_inputs(model) as seen:  # [B, L, d] of each pass; its last state gives the token
            generate_completions(
                model,
                [jobs[i] for i in group],
                (),
                pad,
                partial(list, waiting),
                written.update,
                vocab_size=vocab_size,
                use_cache=mode != "uncached",
            )
        for place, index in enumerate(group):
            tokens = written[place].token_ids
            found = torch.stack([step[place, -1] for step in seen[: len(tokens)]])  # [T, d]
            whole = np.concatenate([jobs[index].prompt, tokens[:-1]]).astype(np.int64)
            with _head_inputs(model) as plain:
                model(input_ids=torch.from_numpy(whole)[None].to(model.device), use_cache=False)
            if not same_states(found, plain[0][0, -len(tokens) :], model.dtype):
                return False
    return True


@contextmanager
def _head_inputs(model: Any) -> Iterator[list[torch.Tensor]]:
    """Collect the inputs of the output layer, [B, L, d] each."""
    seen: list[torch.Tensor] = []
    hook = model.get_output_embeddings().register_forward_pre_hook(
        lambda _, args: seen.append(args[0])
    )
    try:
        yield seen
    finally:
        hook.remove()


def _output_size(model: Any) -> int:
    return int(model.get_output_embeddings().weight.shape[0])


def _ids(model: Any, count: int, vocab_size: int | None = None) -> torch.Tensor:
    """Return ids [count], int64, most of them different."""
    return (7 * torch.arange(count, device=model.device) + 3) % (vocab_size or _output_size(model))

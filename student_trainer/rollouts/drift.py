"""The comparison of an engine's log-probs with the trainer's own, after each sync of weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

# Largest mean difference in log-prob between trainer and engine that rounding explains.
DRIFT_TOLERANCE = {"float32": 1e-3, "float16": 0.05, "bfloat16": 0.25}
PROBE_TOKENS = 8  # that the engine writes
_PROMPT_TOKENS = 16


def probe_prompt(model: Any, limit: int = 2 * _PROMPT_TOKENS) -> list[int]:
    """Return token ids for the engine to continue, at most half of ``limit``."""
    vocab_size = model.config.get_text_config().vocab_size
    return [(7 * i + 3) % vocab_size for i in range(min(_PROMPT_TOKENS, limit // 2))]


def completion_logprobs(
    model: Any, prompt: Sequence[int], completion: Sequence[int]
) -> torch.Tensor:
    """Return the log-probs [T] float32 of a completion's ids, as `trainer_logprobs` finds them."""
    rows = trainer_logprobs(model, [*prompt, *completion])[len(prompt) - 1 : -1]  # [T, V]
    return rows.gather(1, torch.tensor(completion)[:, None])[:, 0]


@torch.no_grad()
def trainer_logprobs(model: Any, token_ids: Sequence[int]) -> torch.Tensor:
    """Return log-probs [L, V] float32 on the CPU, from the trainer's own forward pass.

    If ranks share a sharded model, all must call it together.
    """
    training = model.training
    model.eval()
    try:
        ids = torch.tensor([token_ids], device=next(model.parameters()).device)
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    finally:
        model.train(training)
    return logits[0].float().log_softmax(-1).cpu()

"""Rollouts by transformers' own `generate`, in the training process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from shared.sampling import uniforms
from student_trainer.rollouts.base import Rollout, RolloutRequest


class TransformersRollouts:
    """Left-padded batches through ``model.generate`` with a KV cache.

    Args:
        model: the unwrapped student (a peft model too).
        stop_ids: tokens that end a completion.
        pad_token_id: fills the left of short prompts; masked, so any valid id does.
        max_new_tokens: longest completion.
        temperature: of the sampling; 0 is greedy.
        batch_size: prompts at once; None for all. Those of similar length go together.
        vocab_size: ids from here on are never sampled (padding rows of the output layer).
    """

    def __init__(
        self,
        model: Any,
        *,
        stop_ids: Sequence[int],
        pad_token_id: int,
        max_new_tokens: int,
        temperature: float,
        batch_size: int | None,
        vocab_size: int,
    ) -> None:
        self.model = model
        self.stop_ids = list(stop_ids)
        self.pad_token_id = pad_token_id
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.batch_size = batch_size
        self.vocab_size = vocab_size
        # Nothing of the checkpoint's own sampling defaults (repetition penalty, top-p, …) may
        # change the distribution that rollouts are drawn from.
        self._config = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=self.stop_ids,
            pad_token_id=pad_token_id,
            use_cache=True,
        )

    def generate(self, requests: Sequence[RolloutRequest]) -> Iterator[list[tuple[int, Rollout]]]:
        """See `RolloutEngine.generate`."""
        size = self.batch_size or max(len(requests), 1)
        order = sorted(range(len(requests)), key=lambda i: len(requests[i].prompt_ids))
        for first in range(0, len(order), size):
            indices = order[first : first + size]
            yield list(zip(indices, self._batch([requests[i] for i in indices]), strict=True))

    @torch.no_grad()
    def _batch(self, requests: list[RolloutRequest]) -> list[Rollout]:
        device = next(self.model.parameters()).device
        width = max(len(r.prompt_ids) for r in requests)
        input_ids = torch.full((len(requests), width), self.pad_token_id)  # [B, P], left-padded
        attention_mask = torch.zeros_like(input_ids)
        for row, request in enumerate(requests):
            prompt = torch.from_numpy(request.prompt_ids.astype(np.int64))
            input_ids[row, width - len(prompt) :] = prompt
            attention_mask[row, width - len(prompt) :] = 1
        processors = LogitsProcessorList()
        if self.vocab_size < self.model.get_output_embeddings().weight.shape[0]:
            processors.append(_Restrict(self.vocab_size))
        if self.temperature > 0:
            draws = np.stack([uniforms(*r.key, count=self.max_new_tokens) for r in requests])
            processors.append(_Sample(draws, width, self.temperature))
        with _generating(self.model, self._config):
            output = self.model.generate(
                input_ids=input_ids.to(device),
                attention_mask=attention_mask.to(device),
                logits_processor=processors,
            )
        return [self._cut(row) for row in output[:, width:].cpu().numpy()]

    def _cut(self, row: NDArray[np.int64]) -> Rollout:
        ends = np.flatnonzero(np.isin(row, self.stop_ids))
        length = int(ends[0]) + 1 if len(ends) else len(row)
        return Rollout(row[:length].astype(np.uint32), truncated=not len(ends))


class _Restrict(LogitsProcessor):
    """Leaves only ids below ``vocab_size``."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        scores[:, self.vocab_size :] = float("-inf")
        return scores


class _Sample(LogitsProcessor):
    """Inverse-CDF sampling from one given uniform a token, so randomness follows the sample.

    `generate` then picks the one id left. uniforms: [B, max_new_tokens] in [0, 1).
    """

    def __init__(self, draws: NDArray[np.float64], prompt_width: int, temperature: float) -> None:
        self.draws = torch.from_numpy(draws)
        self.prompt_width = prompt_width
        self.temperature = temperature

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        step = input_ids.shape[1] - self.prompt_width
        cdf = (scores.double() / self.temperature).softmax(-1).cumsum(-1)  # [B, V]
        total = cdf[:, -1:]
        # Below the total, and searched from the right: never an id of zero probability.
        point = self.draws[:, step : step + 1].to(cdf) * total
        point = torch.minimum(point, total.nextafter(torch.zeros_like(total)))
        chosen = torch.searchsorted(cdf, point, right=True)  # [B, 1]
        return torch.full_like(scores, float("-inf")).scatter_(1, chosen, 0.0)


@contextmanager
def _generating(model: Any, config: GenerationConfig) -> Iterator[None]:
    """Evaluation mode (so that gradient checkpointing does not forbid the cache) and our config."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    training, own = model.training, inner.generation_config
    model.eval()
    inner.generation_config = config
    try:
        yield
    finally:
        inner.generation_config = own
        model.train(training)

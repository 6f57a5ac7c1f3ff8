"""Rollouts by the student itself, in the training process."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch.distributed.fsdp import FSDPModule
from torch.nn.functional import pad
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.integrations import is_deepspeed_zero3_enabled

from shared.errors import RolloutError
from shared.sampling import uniforms
from student_trainer.rollouts.base import Rollout, RolloutRequest
from student_trainer.rollouts.sampling import sample_tokens
from student_trainer.rollouts.stops import StopDetector


class TransformersRollouts:
    """One forward pass a token for all rows, left-padded, over transformers' KV cache.

    A finished row leaves at once: its rollout is handed over, and neither compute nor cache is
    spent on it any more. With a ``batch_size``, prompts that wait take the places left by others.
    Nothing of the checkpoint's own sampling defaults (repetition penalty, top-p, …) is used.

    Where ranks share a sharded model (FSDP2, ZeRO-3), each forward pass is a collective: a rank
    that has finished goes on with empty ones until all have.

    Args:
        model: the student, as it is called in training (a peft model too), not yet in DDP.
        stop_ids: tokens that end a completion.
        pad_token_id: fills the left of short prompts; masked, so any valid id does.
        max_new_tokens: longest completion.
        temperature: of the sampling; 0 is greedy.
        batch_size: rows at once; None for all.
        vocab_size: ids from here on are never sampled (padding rows of the output layer).
        one_group: of a sharded model, hand all rollouts over together, because the caller runs the
            model between groups and ranks would do so at different times.
        stop_strings: strings that end a completion too; the tokens that spell one stay part of it.
    """

    elsewhere = False

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
        one_group: bool = False,
        stop_strings: StopDetector | None = None,
    ) -> None:
        self.model = model
        self.stop_ids = frozenset(stop_ids)
        self.pad_token_id = pad_token_id
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.batch_size = batch_size
        self.vocab_size = vocab_size
        self.one_group = one_group
        self.stop_strings = stop_strings
        self._causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._accepted = inspect.signature(type(self._causal_lm).forward).parameters

    def sync(self, weight_version: int) -> None:
        """Nothing to do: the weights are the student's own."""

    def generate(self, requests: Sequence[RolloutRequest]) -> Iterator[list[tuple[int, Rollout]]]:
        """See `RolloutEngine.generate`.

        Raises:
            RolloutError: the model's logits are not finite.
        """
        sharded = _is_sharded(self.model)
        groups = self._groups(requests, sharded)
        if sharded and self.one_group:
            yield [item for group in groups for item in group]
        else:
            yield from groups

    def _groups(
        self, requests: Sequence[RolloutRequest], sharded: bool
    ) -> Iterator[list[tuple[int, Rollout]]]:
        # Prompts of similar length start together: less padding.
        waiting = sorted(range(len(requests)), key=lambda i: len(requests[i].prompt_ids))
        running: _Rows | None = None
        with _evaluating(self.model):
            # One forward pass a round, whatever it is of, so that ranks stay in step.
            while _anyone(bool(waiting) or running is not None, self._device, sharded):
                places = self._places(running)
                if waiting and places:
                    rows = self._start([(i, requests[i]) for i in waiting[:places]])
                    waiting = waiting[places:]
                elif running is not None:
                    rows, running = self._advance(running), None
                else:
                    self._forward(torch.tensor([[self.pad_token_id]]), torch.ones(1, 1), None)
                    continue
                finished, left = self._part(rows)
                if left is not None:
                    running = left if running is None else running.joined(left)
                if finished:
                    yield finished

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _places(self, running: _Rows | None) -> int:
        """How many prompts shall start now.

        A prefill makes all rows wait, so a quarter of the places shall be free for one.
        """
        if self.batch_size is None:
            return 1 << 30
        if running is None:
            return self.batch_size
        free = self.batch_size - len(running.indices)
        return free if running.can_join and free >= self.batch_size / 4 else 0

    def _start(self, asked: Sequence[tuple[int, RolloutRequest]]) -> _Rows:
        """Prompts [B, P] into a new cache, and the first token of each."""
        width = max(len(request.prompt_ids) for _, request in asked)
        input_ids = torch.full((len(asked), width), self.pad_token_id)
        mask = torch.zeros_like(input_ids)
        for row, (_, request) in enumerate(asked):
            prompt = torch.from_numpy(request.prompt_ids.astype(np.int64))
            input_ids[row, width - len(prompt) :] = prompt
            mask[row, width - len(prompt) :] = 1
        rows = _Rows(
            indices=[index for index, _ in asked],
            prompts=[request.prompt_ids for _, request in asked],
            tokens=[[] for _ in asked],
            draws=[uniforms(*r.key, count=self.max_new_tokens) for _, r in asked],
            mask=mask.to(self._device),
            cache=DynamicCache(config=self._causal_lm.config.get_text_config(decoder=True)),
        )
        return self._sampled(rows, input_ids)

    def _advance(self, rows: _Rows) -> _Rows:
        rows.mask = pad(rows.mask, (0, 1), value=1)
        return self._sampled(rows, torch.tensor([[ids[-1]] for ids in rows.tokens]))

    def _sampled(self, rows: _Rows, input_ids: torch.Tensor) -> _Rows:
        """The rows, one token longer."""
        logits = self._forward(input_ids, rows.mask, rows.cache)
        drawn = torch.tensor(
            [draws[len(ids)] for draws, ids in zip(rows.draws, rows.tokens, strict=True)],
            dtype=torch.float64,
        )
        chosen = sample_tokens(
            logits[:, : self.vocab_size], drawn.to(logits.device), self.temperature
        )
        for ids, token in zip(rows.tokens, chosen.tolist(), strict=True):
            if token < 0:
                raise RolloutError(
                    "the student's logits are not finite: training has diverged. Lower "
                    "--learning_rate, or check the weights it starts from"
                )
            ids.append(token)
        return rows

    @torch.no_grad()
    def _forward(self, input_ids: torch.Tensor, mask: torch.Tensor, cache: Any) -> torch.Tensor:
        """Logits [B, V] of what follows input_ids [B, L]; mask [B, cached + L]."""
        mask = mask.to(self._device).long()
        options: dict[str, Any] = {"attention_mask": mask, "use_cache": cache is not None}
        if cache is not None:
            name = "cache_params" if "cache_params" in self._accepted else "past_key_values"
            options[name] = cache
        if "position_ids" in self._accepted:
            positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)
            options["position_ids"] = positions[:, -input_ids.shape[1] :]
        if "logits_to_keep" in self._accepted:
            options["logits_to_keep"] = 1
        first = input_ids.shape[1] == mask.shape[1]
        inputs = self._causal_lm.prepare_inputs_for_generation(
            input_ids.to(self._device), is_first_iteration=first, **options
        )
        return self.model(**inputs).logits[:, -1]

    def _part(self, rows: _Rows) -> tuple[list[tuple[int, Rollout]], _Rows | None]:
        """What has ended, and the rows that go on."""
        ended: list[tuple[int, Rollout]] = []
        left: list[int] = []
        columns = zip(rows.indices, rows.prompts, rows.tokens, strict=True)
        for row, (index, prompt, ids) in enumerate(columns):
            stopped = ids[-1] in self.stop_ids or (
                self.stop_strings is not None and self.stop_strings.end(prompt, ids)
            )
            if stopped or len(ids) == self.max_new_tokens:
                ended.append((index, Rollout(np.array(ids, np.uint32), truncated=not stopped)))
            else:
                left.append(row)
        return ended, rows.only(left)


@dataclass
class _Rows:
    """Completions that are being written.

    Attributes:
        indices: of their requests.
        prompts: ids [P] of each.
        tokens: what is written so far.
        draws: one uniform for each token that may be written.
        mask: [B, W] int64, which columns of the cache are tokens of the row.
        cache: of W tokens; all but the last one written.
    """

    indices: list[int]
    prompts: list[NDArray[np.uint32]]
    tokens: list[list[int]]
    draws: list[Any]
    mask: torch.Tensor
    cache: Any

    @property
    def can_join(self) -> bool:
        """Whether the cache is nothing but keys and values of all tokens."""
        return all(type(layer) is DynamicLayer for layer in self.cache.layers)

    def only(self, kept: list[int]) -> _Rows | None:
        """Those rows; columns that only others needed are given up."""
        if len(kept) == len(self.indices):
            return self
        if not kept:
            return None
        rows = torch.tensor(kept, device=self.mask.device)
        self.cache.reorder_cache(rows)  # any rows, fewer too
        self.mask = self.mask[rows]
        if self.can_join:
            first = int(self.mask.any(dim=0).int().argmax())
            self.mask = self.mask[:, first:]
            for layer in self.cache.layers:
                layer.keys, layer.values = layer.keys[..., first:, :], layer.values[..., first:, :]
        for name in ("indices", "prompts", "tokens", "draws"):
            values = getattr(self, name)
            setattr(self, name, [values[row] for row in kept])
        return self

    def joined(self, other: _Rows) -> _Rows:
        """Both as one batch, the narrower cache padded on its left."""
        width = max(self.mask.shape[1], other.mask.shape[1])
        for mine, theirs in zip(self.cache.layers, other.cache.layers, strict=True):
            mine.keys = torch.cat([_widened(mine.keys, width), _widened(theirs.keys, width)])
            mine.values = torch.cat([_widened(mine.values, width), _widened(theirs.values, width)])
        masks = [pad(rows.mask, (width - rows.mask.shape[1], 0)) for rows in (self, other)]
        return _Rows(
            indices=self.indices + other.indices,
            prompts=self.prompts + other.prompts,
            tokens=self.tokens + other.tokens,
            draws=self.draws + other.draws,
            mask=torch.cat(masks),
            cache=self.cache,
        )


def _widened(states: torch.Tensor, width: int) -> torch.Tensor:
    """Keys or values [B, H, W, D] as [B, H, width, D]."""
    return pad(states, (0, 0, width - states.shape[-2], 0))


def _is_sharded(model: Any) -> bool:
    """Whether ranks hold parts of one model, so that a forward pass needs all of them."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return False
    return isinstance(model, FSDPModule) or is_deepspeed_zero3_enabled()


def _anyone(busy: bool, device: torch.device, sharded: bool) -> bool:
    """Whether this rank, or of a sharded model any rank, has something left to do."""
    if not sharded:
        return busy
    flag = torch.tensor(int(busy), device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag)


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """No dropout, and no gradient checkpointing, which would forbid the cache."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)

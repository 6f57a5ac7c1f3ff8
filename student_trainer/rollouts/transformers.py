"""Rollouts by the student itself, in the training process."""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch.distributed.fsdp import FSDPModule
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.integrations import is_deepspeed_zero3_enabled

from shared.errors import RolloutError
from shared.rope import length_dependent_rope
from shared.sampling import uniforms
from shared.text import StopSearch
from student_trainer.model.probe import PROBE_ERRORS, record_head_inputs, same_states
from student_trainer.rollouts.base import Rollout, RolloutRequest, StartSearch
from student_trainer.rollouts.sampling import sample_tokens

logger = logging.getLogger(__name__)

# Rows left-padded in one batch over a cache, one at a time over a cache, or whole sequences again
# for each token: padded on the right, where a causal model never looks.
GenerationMode = Literal["batched", "alone", "uncached"]

_MODES: WeakKeyDictionary[Any, GenerationMode] = WeakKeyDictionary()  # by model, as told by a trial


class TransformersRollouts:
    """One forward pass a token for all rows, left-padded, over transformers' KV cache.

    A finished row leaves at once: its rollout is handed over, and neither compute nor cache is
    spent on it any more. With a ``batch_size``, prompts that wait take the places left by others.
    Nothing of the checkpoint's own sampling defaults (repetition penalty, top-p, …) is used.

    Where a trial shows that a model so writes other tokens than each prompt alone (states that mind
    the padding or the order of rows), it writes one at a time, or without a cache. A sequence that
    may grow past the original length of a `LengthDependentRope` is written alone, and its cache is
    begun anew where its positions change.

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
        stop_strings: begins to look for strings that end a completion too; the tokens that spell
            one stay part of it.
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
        stop_strings: StartSearch | None = None,
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
        self._rope = length_dependent_rope(self._causal_lm.config)
        self._mode: GenerationMode = "batched"
        self._trial: _Trial | None = None

    def prepare(self) -> None:
        """Find out by a trial how this model writes right, once for each model.

        Where ranks share a sharded model, all must call it together. `generate` calls it too.

        Raises:
            RolloutError: in no way does the model write what its plain forward pass says.
        """
        if self._causal_lm not in _MODES:
            with _evaluation_mode(self.model):
                _MODES[self._causal_lm] = self._find_mode()
        self._mode = _MODES[self._causal_lm]

    def _find_mode(self) -> GenerationMode:
        name, errors = type(self._causal_lm).__name__, []
        modes: tuple[GenerationMode, ...] = ("batched", "alone", "uncached")
        for mode in modes:
            try:
                if not self._generates_correctly(mode):
                    errors.append(f"{mode}: other states than alone")
                    continue
            except torch.OutOfMemoryError:
                raise
            except PROBE_ERRORS as error:
                errors.append(f"{mode}: {type(error).__name__}: {error}")
                continue
            if mode != "batched":
                logger.warning(
                    "%s does not write in a batch what it writes alone: rollouts are generated %s",
                    name,
                    "one at a time" if mode == "alone" else "without a cache, which is slow",
                )
            return mode
        kind = self._causal_lm.config.get_text_config().model_type
        told = "; ".join(" ".join(error.split())[:120] for error in errors)
        raise RolloutError(
            f"{name} ({kind}) does not generate right in transformers ({told}); pass "
            "--rollout_engine vllm, or train without its own completions (--lmbda 0)"
        )

    @torch.no_grad()
    def _generates_correctly(self, mode: GenerationMode) -> bool:
        """Tell whether a few tokens get the states of a plain forward pass of each sequence alone.

        Prompts of unlike length; a row leaves, the others change places, and a new one joins.
        """
        lengths = [6, 11, 5, 8]
        ids = (7 * np.arange(sum(lengths), dtype=np.uint32) + 3) % self.vocab_size
        prompts = np.split(ids, np.cumsum(lengths)[:-1])
        asked = [(i, RolloutRequest(p, ("trial", i))) for i, p in enumerate(prompts)]
        trial = copy.copy(self)
        trial.temperature, trial.max_new_tokens, trial._mode = 0.0, 4, mode
        with record_head_inputs(self._causal_lm) as met:
            trial._trial = _Trial(met)
            for part in [[one] for one in asked] if mode == "alone" else [asked]:
                rows = trial._advance(trial._start(part[:3]))
                left = rows.select([2, 0]) if len(part) > 1 else rows
                assert left is not None
                rows = trial._advance(left)
                if part[3:] and rows.can_join:
                    rows = rows.merged(trial._start(part[3:]))
                trial._advance(rows)
        for index, (tokens, states) in trial._trial.generated.items():
            whole = torch.tensor([[*prompts[index].tolist(), *tokens[:-1]]])
            with record_head_inputs(self._causal_lm) as plain:
                self.model(input_ids=whole.to(self._device), use_cache=False)
            if not same_states(torch.stack(states), plain[0][0, -len(tokens) :]):
                return False
        return True

    def sync(self, weight_version: int) -> None:
        """Nothing to do: the weights are the student's own."""

    def generate(self, requests: Sequence[RolloutRequest]) -> Iterator[list[tuple[int, Rollout]]]:
        """See `RolloutEngine.generate`.

        Raises:
            RolloutError: the model's logits are not finite, or see `prepare`.
        """
        self.prepare()
        sharded = _is_sharded(self.model)
        groups = self._groups(requests, sharded)
        if sharded and self.one_group:
            yield [item for group in groups for item in group]
        else:
            yield from groups

    def _groups(
        self, requests: Sequence[RolloutRequest], sharded: bool
    ) -> Iterator[list[tuple[int, Rollout]]]:
        # Prompts of similar length start together: less padding. Those that are alone come last.
        outgrows = [self._may_outgrow_positions(request) for request in requests]
        waiting = sorted(
            range(len(requests)), key=lambda i: (outgrows[i], len(requests[i].prompt_ids))
        )
        running: _RunningBatch | None = None
        with _evaluation_mode(self.model):
            # One forward pass a round, whatever it is of, so that ranks stay in step.
            while _any_rank_busy(bool(waiting) or running is not None, self._device, sharded):
                places = self._free_places(running)
                if waiting and (self._mode == "alone" or outgrows[waiting[0]]):
                    places = int(running is None)
                elif waiting:
                    places = min(places, sum(not outgrows[index] for index in waiting))
                if waiting and places:
                    rows = self._start([(i, requests[i]) for i in waiting[:places]])
                    waiting = waiting[places:]
                elif running is not None:
                    rows, running = self._advance(running), None
                else:
                    self._forward(torch.tensor([[self.pad_token_id]]), torch.ones(1, 1), None)
                    continue
                finished, left = self._split_finished(rows)
                if left is not None:
                    running = left if running is None else running.merged(left)
                if finished:
                    yield finished

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _free_places(self, running: _RunningBatch | None) -> int:
        """How many prompts shall start now.

        A prefill makes all rows wait, so a quarter of the places shall be free for one.
        """
        if self.batch_size is None:
            return 1 << 30
        if running is None:
            return self.batch_size
        free = self.batch_size - len(running.indices)
        return free if running.can_join and free >= self.batch_size / 4 else 0

    def _may_outgrow_positions(self, request: RolloutRequest) -> bool:
        """Tell whether a completion may pass the original length, where positions change."""
        longest = len(request.prompt_ids) + self.max_new_tokens
        return self._rope is not None and self._rope.regime(longest) != 0

    def _start(self, asked: Sequence[tuple[int, RolloutRequest]]) -> _RunningBatch:
        """The first token of each prompt."""
        rows = _RunningBatch(
            indices=[index for index, _ in asked],
            prompts=[request.prompt_ids for _, request in asked],
            tokens=[[] for _ in asked],
            draws=[uniforms(*r.key, count=self.max_new_tokens) for _, r in asked],
            searches=[self.stop_strings and self.stop_strings(r.prompt_ids) for _, r in asked],
            mask=torch.ones(len(asked), 0, dtype=torch.long, device=self._device),
            cache=None,
        )
        return self._append_tokens(rows, self._prefill(rows))

    def _advance(self, rows: _RunningBatch) -> _RunningBatch:
        if rows.cache is None or self._changes_positions(rows):
            return self._append_tokens(rows, self._prefill(rows))
        self._reset_positions(rows)
        rows.mask = pad(rows.mask, (0, 1), value=1)
        last = torch.tensor([[ids[-1]] for ids in rows.tokens])
        return self._append_tokens(rows, self._forward(last, rows.mask, rows.cache))

    def _prefill(self, rows: _RunningBatch) -> torch.Tensor:
        """Logits [B, V] of what follows the rows, all of them put into a new cache if any."""
        self._reset_positions(rows)
        sequences = [
            torch.tensor([*prompt.tolist(), *ids])
            for prompt, ids in zip(rows.prompts, rows.tokens, strict=True)
        ]
        if self._mode == "uncached":
            return self._uncached(sequences)
        width = max(map(len, sequences))
        input_ids = torch.full((len(sequences), width), self.pad_token_id)  # [B, P]
        mask = torch.zeros_like(input_ids)
        for row, ids in enumerate(sequences):
            input_ids[row, width - len(ids) :] = ids
            mask[row, width - len(ids) :] = 1
        rows.mask = mask.to(self._device)
        rows.cache = DynamicCache(config=self._causal_lm.config.get_text_config(decoder=True))
        return self._forward(input_ids, rows.mask, rows.cache)

    def _changes_positions(self, rows: _RunningBatch) -> bool:
        """Tell whether the keys in the cache have other positions than those to come."""
        rope = self._rope
        return rope is not None and any(
            rope.regime(length) != rope.regime(length - 1) for length in rows.lengths
        )

    @torch.no_grad()
    def _reset_positions(self, rows: _RunningBatch) -> None:
        """Let no longer sequence of before change the positions of these."""
        rope = self._rope
        if rope is None or _is_sharded(self.model) or not rope.keeps_lengths(max(rows.lengths)):
            return
        one = torch.full((1, 1), self.pad_token_id, device=self._device)
        self.model(input_ids=one, use_cache=False)

    def _append_tokens(self, rows: _RunningBatch, logits: torch.Tensor) -> _RunningBatch:
        """The rows, one token longer by the logits [B, V]."""
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
        if self._trial is not None:
            states = self._trial.states(len(rows.indices))
            for index, ids, row in zip(rows.indices, rows.tokens, states, strict=True):
                self._trial.generated.setdefault(index, (ids, []))[1].append(row)
        return rows

    @torch.no_grad()
    def _uncached(self, sequences: Sequence[torch.Tensor]) -> torch.Tensor:
        """Logits [B, V] of what follows the sequences, from a forward pass over all of them."""
        input_ids = pad_sequence(
            list(sequences), batch_first=True, padding_value=self.pad_token_id
        )  # [B, L]
        last = torch.tensor([len(ids) - 1 for ids in sequences], device=self._device)
        options: dict[str, Any] = {}
        if "logits_to_keep" in self._accepted:
            options["logits_to_keep"], last = last.unique(return_inverse=True)
        if self._trial is not None:
            self._trial.last = last
        logits = self.model(
            input_ids=input_ids.to(self._device), use_cache=False, **options
        ).logits  # [B, U, V]
        return logits[torch.arange(len(last), device=last.device), last]

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
        if cache is not None:
            inputs[name] = cache  # Phi-3 drops it at its original length, also where it is new
        return self.model(**inputs).logits[:, -1]

    def _split_finished(
        self, rows: _RunningBatch
    ) -> tuple[list[tuple[int, Rollout]], _RunningBatch | None]:
        """What has ended, and the rows that go on."""
        ended: list[tuple[int, Rollout]] = []
        left: list[int] = []
        columns = zip(rows.indices, rows.tokens, rows.searches, strict=True)
        for row, (index, ids, search) in enumerate(columns):
            found = search is not None and search.add(ids[-1])
            stopped = found or ids[-1] in self.stop_ids
            if stopped or len(ids) == self.max_new_tokens:
                ended.append((index, Rollout(np.array(ids, np.uint32), truncated=not stopped)))
            else:
                left.append(row)
        return ended, rows.select(left)


@dataclass
class _Trial:
    """The record of a trial.

    Attributes:
        met: by the output layer, [B, L, d] in each forward pass.
        last: which column of it each row goes on from; None for the last one.
        rows: tokens of each prompt, and the state [d] that each was drawn from.
    """

    met: list[torch.Tensor]
    last: torch.Tensor | None = None
    generated: dict[int, tuple[list[int], list[torch.Tensor]]] = field(default_factory=dict)

    def states(self, count: int) -> torch.Tensor:
        """Those of the latest pass, [B, d]."""
        last = self.last if self.last is not None else torch.full((count,), -1)
        states = self.met[-1]
        return states[torch.arange(count, device=states.device), last.to(states.device)]


@dataclass
class _RunningBatch:
    """Completions that are being written.

    Attributes:
        indices: of their requests.
        prompts: ids [P] of each.
        tokens: what is written so far.
        draws: one uniform for each token that may be written.
        searches: for stop strings in what is written; None where there are none.
        mask: [B, W] int64, which columns of the cache are tokens of the row.
        cache: of W tokens; all but the last one written. None before there is one, or for good.
    """

    indices: list[int]
    prompts: list[NDArray[np.uint32]]
    tokens: list[list[int]]
    draws: list[Any]
    searches: list[StopSearch | None]
    mask: torch.Tensor
    cache: Any

    @property
    def lengths(self) -> list[int]:
        """Tokens of each, prompt and completion."""
        pairs = zip(self.prompts, self.tokens, strict=True)
        return [len(prompt) + len(ids) for prompt, ids in pairs]

    @property
    def can_join(self) -> bool:
        """Whether the cache is nothing but keys and values of all tokens."""
        return self.cache is None or all(type(layer) is DynamicLayer for layer in self.cache.layers)

    def select(self, kept: list[int]) -> _RunningBatch | None:
        """Those rows; columns that only others needed are given up."""
        if len(kept) == len(self.indices):
            return self
        if not kept:
            return None
        rows = torch.tensor(kept, device=self.mask.device)
        self.mask = self.mask[rows]
        if self.cache is not None:
            self.cache.reorder_cache(rows)  # any rows, fewer too
        if self.cache is not None and self.can_join:
            first = int(self.mask.any(dim=0).int().argmax())
            self.mask = self.mask[:, first:]
            for layer in self.cache.layers:
                layer.keys, layer.values = layer.keys[..., first:, :], layer.values[..., first:, :]
        for name in ("indices", "prompts", "tokens", "draws", "searches"):
            values = getattr(self, name)
            setattr(self, name, [values[row] for row in kept])
        return self

    def merged(self, other: _RunningBatch) -> _RunningBatch:
        """Both as one batch, the narrower cache padded on its left."""
        width = max(self.mask.shape[1], other.mask.shape[1])
        layers = [[] if rows.cache is None else rows.cache.layers for rows in (self, other)]
        for mine, theirs in zip(*layers, strict=True):
            mine.keys = torch.cat([_pad_left(mine.keys, width), _pad_left(theirs.keys, width)])
            mine.values = torch.cat(
                [_pad_left(mine.values, width), _pad_left(theirs.values, width)]
            )
        masks = [pad(rows.mask, (width - rows.mask.shape[1], 0)) for rows in (self, other)]
        return _RunningBatch(
            indices=self.indices + other.indices,
            prompts=self.prompts + other.prompts,
            tokens=self.tokens + other.tokens,
            draws=self.draws + other.draws,
            searches=self.searches + other.searches,
            mask=torch.cat(masks),
            cache=self.cache,
        )


def _pad_left(states: torch.Tensor, width: int) -> torch.Tensor:
    """Keys or values [B, H, W, D] as [B, H, width, D]."""
    return pad(states, (0, 0, width - states.shape[-2], 0))


def _is_sharded(model: Any) -> bool:
    """Whether ranks hold parts of one model, so that a forward pass needs all of them."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return False
    return isinstance(model, FSDPModule) or is_deepspeed_zero3_enabled()


def _any_rank_busy(busy: bool, device: torch.device, sharded: bool) -> bool:
    """Whether this rank, or of a sharded model any rank, has something left to do."""
    if not sharded:
        return busy
    flag = torch.tensor(int(busy), device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag)


@contextmanager
def _evaluation_mode(model: Any) -> Iterator[None]:
    """No dropout, and no gradient checkpointing, which would forbid the cache."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)

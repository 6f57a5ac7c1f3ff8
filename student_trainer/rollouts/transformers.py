"""The rollout engine that generates with the student itself, in the training process."""

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
from torch.distributed.fsdp import FSDPModule
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache
from transformers.integrations import is_deepspeed_zero3_enabled

from shared.errors import RolloutError
from shared.rope import length_dependent_rope
from shared.sampling import uniforms
from student_trainer.model.probe import PROBE_ERRORS, record_head_inputs, same_states
from student_trainer.rollouts.autocast import casts_kept
from student_trainer.rollouts.base import (
    NO_FILTER,
    Rollout,
    RolloutRequest,
    StartSearch,
    TokenFilter,
)
from student_trainer.rollouts.running_batch import RunningBatch
from student_trainer.rollouts.sampling import sample_tokens

logger = logging.getLogger(__name__)

# "batched": a left-padded batch with a cache. "alone": one sequence at a time with a cache.
# "uncached": whole sequences again for each token, padded on the right, which causal models ignore.
GenerationMode = Literal["batched", "alone", "uncached"]

_MODES: WeakKeyDictionary[Any, GenerationMode] = WeakKeyDictionary()  # the found mode of each model


class TransformersRollouts:
    """A rollout engine with one forward pass per token for a left-padded batch, over a KV cache.

    A finished sequence leaves the batch at once, so no compute or cache is spent on it. With a
    ``batch_size``, waiting prompts take the places of finished ones. The checkpoint's own sampling
    defaults (repetition penalty, top-p, …) are not used.

    If a trial shows that the model generates other tokens in a batch than alone (because its states
    depend on padding or on other sequences), it generates one sequence at a time, or without a
    cache. A sequence that may exceed the original length of a `LengthDependentRope` is generated
    alone, and its cache is computed again where its positions change.

    If ranks share a sharded model (FSDP2, ZeRO-3), each forward pass is a collective: a rank that
    has finished makes empty passes until all have.

    Args:
        model: the student, as it is called in training (a peft model too), not yet in DDP.
        stop_ids: tokens that end a completion.
        pad_token_id: fills the left of short prompts; it is masked, so any valid id will do.
        max_new_tokens: longest completion.
        temperature: temperature of the sampling; 0 is greedy.
        batch_size: sequences in the batch; None for all.
        vocab_size: number of ids that may be sampled; the output layer may have padding above.
        token_filter: the tokens that one is drawn from.
        one_group: with a sharded model, yield all rollouts together, because the caller runs the
            model between groups and ranks would do so at different times.
        stop_strings: starts a search for strings that end a completion too; the tokens that spell
            one are part of it.
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
        token_filter: TokenFilter = NO_FILTER,
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
        self.token_filter = token_filter
        self.one_group = one_group
        self.stop_strings = stop_strings
        self._causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._accepted = inspect.signature(type(self._causal_lm).forward).parameters
        self._rope = length_dependent_rope(self._causal_lm.config)
        self._mode: GenerationMode = "batched"
        self._trial: _Trial | None = None

    def prepare(self) -> None:
        """Find the generation mode that is right for this model, by a trial, once for each model.

        If ranks share a sharded model, all must call it together. `generate` calls it too.

        Raises:
            RolloutError: no mode gives the states of the model's plain forward pass.
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
        """Return whether a mode gives the states of a plain forward pass of each sequence alone.

        The trial has prompts of different lengths; one leaves the batch, the others change places,
        and a new one joins.
        """
        lengths = [6, 11, 5, 8]
        ids = (7 * np.arange(sum(lengths), dtype=np.uint32) + 3) % self.vocab_size
        prompts = np.split(ids, np.cumsum(lengths)[:-1])
        requests = [(i, RolloutRequest(p, ("trial", i))) for i, p in enumerate(prompts)]
        trial = copy.copy(self)
        trial.temperature, trial.max_new_tokens, trial._mode = 0.0, 4, mode
        with record_head_inputs(self._causal_lm) as head_inputs:
            trial._trial = _Trial(head_inputs)
            for part in [[one] for one in requests] if mode == "alone" else [requests]:
                batch = trial._advance(trial._start(part[:3]))
                left = batch.select([2, 0]) if len(part) > 1 else batch
                assert left is not None
                batch = trial._advance(left)
                if part[3:] and batch.can_join:
                    batch = batch.merged(trial._start(part[3:]))
                trial._advance(batch)
        for index, (tokens, states) in trial._trial.generated.items():
            whole = torch.tensor([[*prompts[index].tolist(), *tokens[:-1]]])
            with record_head_inputs(self._causal_lm) as plain:
                self.model(input_ids=whole.to(self._device), use_cache=False)
            if not same_states(torch.stack(states), plain[0][0, -len(tokens) :]):
                return False
        return True

    def sync(self, weight_version: int) -> None:
        """Do nothing, because the weights are the student's own."""

    def generate(self, requests: Sequence[RolloutRequest]) -> Iterator[list[tuple[int, Rollout]]]:
        """Yield groups of (index of the request, rollout), as `RolloutEngine.generate` says.

        Raises:
            RolloutError: the model's logits are not finite, or as in `prepare`.
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
        # Prompts of similar length start together for less padding; those run alone come last.
        outgrows = [self._may_outgrow_positions(request) for request in requests]
        waiting = sorted(
            range(len(requests)), key=lambda i: (outgrows[i], len(requests[i].prompt_ids))
        )
        running: RunningBatch | None = None
        with _evaluation_mode(self.model), casts_kept(not sharded) as casts_dropped:
            # Each round makes exactly one forward pass, so that ranks of a sharded model match.
            while _any_rank_busy(bool(waiting) or running is not None, self._device, sharded):
                places = self._free_places(running)
                if waiting and (self._mode == "alone" or outgrows[waiting[0]]):
                    places = int(running is None)
                elif waiting:
                    places = min(places, sum(not outgrows[index] for index in waiting))
                if waiting and places:
                    batch = self._start([(i, requests[i]) for i in waiting[:places]])
                    waiting = waiting[places:]
                elif running is not None:
                    batch, running = self._advance(running), None
                else:
                    self._forward(torch.tensor([[self.pad_token_id]]), torch.ones(1, 1), None)
                    continue
                finished, left = self._split_finished(batch)
                if left is not None:
                    running = left if running is None else running.merged(left)
                if finished:
                    with casts_dropped():  # the caller may train
                        yield finished

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _free_places(self, running: RunningBatch | None) -> int:
        """Return the number of prompts that may start now.

        A prefill makes all running sequences wait, so it starts when a quarter of the places is
        free.
        """
        if self.batch_size is None:
            return 1 << 30
        if running is None:
            return self.batch_size
        free = self.batch_size - len(running.indices)
        return free if running.can_join and free >= self.batch_size / 4 else 0

    def _may_outgrow_positions(self, request: RolloutRequest) -> bool:
        """Return whether a completion may exceed the original length, where positions change."""
        longest = len(request.prompt_ids) + self.max_new_tokens
        return self._rope is not None and self._rope.regime(longest) != 0

    def _start(self, requests: Sequence[tuple[int, RolloutRequest]]) -> RunningBatch:
        """Return a new batch of the requests, with the first token of each completion."""
        batch = RunningBatch(
            indices=[index for index, _ in requests],
            prompts=[request.prompt_ids for _, request in requests],
            tokens=[[] for _ in requests],
            draws=[uniforms(*r.key, count=self.max_new_tokens) for _, r in requests],
            searches=[self.stop_strings and self.stop_strings(r.prompt_ids) for _, r in requests],
            mask=torch.ones(len(requests), 0, dtype=torch.long, device=self._device),
            cache=None,
        )
        return self._append_tokens(batch, self._prefill(batch))

    def _advance(self, batch: RunningBatch) -> RunningBatch:
        """Return the batch with one more token for each sequence."""
        if batch.cache is None or self._changes_positions(batch):
            return self._append_tokens(batch, self._prefill(batch))
        self._reset_positions(batch)
        batch.mask = pad(batch.mask, (0, 1), value=1)
        last = torch.tensor([[ids[-1]] for ids in batch.tokens])
        return self._append_tokens(batch, self._forward(last, batch.mask, batch.cache))

    def _prefill(self, batch: RunningBatch) -> torch.Tensor:
        """Return logits [B, V] after the sequences; their tokens fill a new cache, if any.

        Equal sequences, such as a prompt with several completions, are computed once.
        """
        self._reset_positions(batch)
        sequences = [
            torch.tensor([*prompt.tolist(), *ids])
            for prompt, ids in zip(batch.prompts, batch.tokens, strict=True)
        ]
        if self._mode == "uncached":
            return self._uncached(sequences)
        batch.cache = DynamicCache(config=self._causal_lm.config.get_text_config(decoder=True))
        different, places = sequences, list(range(len(sequences)))
        if batch.can_join:  # a cache of keys and values, whose rows can be repeated
            different, places = _without_repeats(sequences)
        width = max(map(len, different))
        input_ids = torch.full((len(different), width), self.pad_token_id)  # [B', P]
        mask = torch.zeros_like(input_ids)
        for index, ids in enumerate(different):
            input_ids[index, width - len(ids) :] = ids
            mask[index, width - len(ids) :] = 1
        batch.mask = mask.to(self._device)
        logits = self._forward(input_ids, batch.mask, batch.cache)
        if len(different) < len(sequences):
            repeated = torch.tensor(places, device=self._device)
            batch.cache.reorder_cache(repeated)  # it also takes more sequences
            batch.mask, logits = batch.mask[repeated], logits[repeated]
        return logits

    def _changes_positions(self, batch: RunningBatch) -> bool:
        """Return whether the next token changes the positions of the keys in the cache."""
        rope = self._rope
        return rope is not None and any(
            rope.regime(length) != rope.regime(length - 1) for length in batch.lengths
        )

    @torch.no_grad()
    def _reset_positions(self, batch: RunningBatch) -> None:
        """Reset rope frequencies that an earlier, longer sequence left in the model."""
        rope = self._rope
        if rope is None or _is_sharded(self.model) or not rope.keeps_lengths(max(batch.lengths)):
            return
        one = torch.full((1, 1), self.pad_token_id, device=self._device)
        self.model(input_ids=one, use_cache=False)

    def _append_tokens(self, batch: RunningBatch, logits: torch.Tensor) -> RunningBatch:
        """Append one token, sampled from the logits [B, V], to each sequence of the batch."""
        drawn = torch.tensor(
            [draws[len(ids)] for draws, ids in zip(batch.draws, batch.tokens, strict=True)],
            dtype=torch.float64,
        )
        chosen = sample_tokens(
            logits[:, : self.vocab_size],
            drawn.to(logits.device),
            self.temperature,
            self.token_filter,
        )
        for ids, token in zip(batch.tokens, chosen.tolist(), strict=True):
            if token < 0:
                raise RolloutError(
                    "the student's logits are not finite: training has diverged. Lower "
                    "--learning_rate, or check the weights it starts from"
                )
            ids.append(token)
        if self._trial is not None:
            states = self._trial.states(len(batch.indices))
            for index, ids, state in zip(batch.indices, batch.tokens, states, strict=True):
                self._trial.generated.setdefault(index, (ids, []))[1].append(state)
        return batch

    @torch.no_grad()
    def _uncached(self, sequences: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return logits [B, V] after the sequences, from a forward pass over all their tokens."""
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
        """Return logits [B, V] after input_ids [B, L]; mask is [B, cached + L]."""
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
            inputs[name] = cache  # Phi-3 drops even a new cache at its original length
        return self.model(**inputs).logits[:, -1]

    def _split_finished(
        self, batch: RunningBatch
    ) -> tuple[list[tuple[int, Rollout]], RunningBatch | None]:
        """Return the finished rollouts, and the batch of the sequences that continue."""
        ended: list[tuple[int, Rollout]] = []
        left: list[int] = []
        columns = zip(batch.indices, batch.tokens, batch.searches, strict=True)
        for place, (index, ids, search) in enumerate(columns):
            found = search is not None and search.add(ids[-1])
            stopped = found or ids[-1] in self.stop_ids
            if stopped or len(ids) == self.max_new_tokens:
                ended.append((index, Rollout(np.array(ids, np.uint32), truncated=not stopped)))
            else:
                left.append(place)
        return ended, batch.select(left)


@dataclass
class _Trial:
    """The record of a trial of a generation mode.

    Attributes:
        head_inputs: inputs of the output layer, [B, L, d] in each forward pass.
        last: column of each sequence's last token in them; None for the last column.
        generated: tokens for each prompt, and the state [d] from which each was sampled.
    """

    head_inputs: list[torch.Tensor]
    last: torch.Tensor | None = None
    generated: dict[int, tuple[list[int], list[torch.Tensor]]] = field(default_factory=dict)

    def states(self, count: int) -> torch.Tensor:
        """Return the states [B, d] of the last tokens in the latest forward pass."""
        last = self.last if self.last is not None else torch.full((count,), -1)
        states = self.head_inputs[-1]
        return states[torch.arange(count, device=states.device), last.to(states.device)]


def _without_repeats(sequences: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], list[int]]:
    """Return the different ones of the sequences, and the place of each sequence among them."""
    places: dict[tuple[int, ...], int] = {}
    taken = [places.setdefault(tuple(ids.tolist()), len(places)) for ids in sequences]
    return [torch.tensor(ids) for ids in places], taken


def _is_sharded(model: Any) -> bool:
    """Return whether ranks hold parts of one model, so that a forward pass needs all of them."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return False
    return isinstance(model, FSDPModule) or is_deepspeed_zero3_enabled()


def _any_rank_busy(busy: bool, device: torch.device, sharded: bool) -> bool:
    """Return whether this rank is busy or, with a sharded model, whether any rank is."""
    if not sharded:
        return busy
    flag = torch.tensor(int(busy), device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag)


@contextmanager
def _evaluation_mode(model: Any) -> Iterator[None]:
    """Switch off dropout and gradient checkpointing, which forbids a cache, within the block."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)

"""A backend on plain transformers: any causal language model, on CPU or GPU."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from shared.errors import ConfigurationError, PayloadTooLargeError
from shared.identity import model_fingerprint, tokenizer_identity
from shared.protocol import Capabilities, Completion, TeacherIdentity
from shared.rope import LengthDependentRope
from shared.sparse import SparseLogprobs
from teacher_server.backends.adapters import Adapters, adapter_identities
from teacher_server.backends.base import BackendFacts, GenerateJob, ScoreJob
from teacher_server.backends.checkpoint import (
    eos_token_ids,
    from_pretrained,
    load_tokenizer,
    local_folder,
)
from teacher_server.backends.generation import generate_completions, within_context
from teacher_server.backends.probe import probe_batching, probe_causality, probe_generation
from teacher_server.backends.projection import keep_float32_logits
from teacher_server.backends.scoring import score_positions
from teacher_server.batcher import Batcher, Callers, within_padding
from teacher_server.metrics import Metrics
from teacher_server.settings import Settings

logger = logging.getLogger(__name__)

# Finished completions are scored together once in so many tokens, because a forward pass for each
# would delay those still being generated.
SCORE_EVERY = 8
# Tokens in whose time a forward pass begins and ends: a CPU is busy from few tokens on, a GPU waits
# for its kernels to start.
CPU_PASS_TOKENS, GPU_PASS_TOKENS = 64, 512


class TransformersBackend:
    """A backend of one model and one worker thread, where scoring and generation take turns.

    Args:
        settings: model, dtype, device and batch budget.
        metrics: records batches, how long they waited and took, and which did not fit.

    Raises:
        ConfigurationError: the model does not load, or is not causal.
    """

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._metrics = metrics
        self._model = _load_model(settings)
        self._device = next(self._model.parameters()).device
        self._pass_tokens = CPU_PASS_TOKENS if self._device.type == "cpu" else GPU_PASS_TOKENS
        self._tokenizer = tokenizer = load_tokenizer(
            settings.model, trust_remote_code=settings.trust_remote_code
        )
        facts = _facts(settings, self._model, tokenizer)
        pad = tokenizer.pad_token_id
        self._pad = int(pad if pad is not None else (*facts.eos_token_ids, 0)[0])
        self._chunk_bytes = settings.score_chunk_mib << 20
        keep_float32_logits(self._model)
        self._split_head = _head_is_separable(self._model)
        self._rope: LengthDependentRope | None = None
        probe_causality(self._model, settings.model, self._states)
        self._groups_of_lengths, self._rope = probe_batching(
            self._model, facts.max_model_len, self._states
        )
        self._adapters = Adapters(self._model, settings.adapters)
        self._adapters.probe(self._states, self._model.dtype)
        self._mode = probe_generation(self._model, self._pad, facts.tokenizer.vocab_size)
        can = facts.capabilities.model_copy(update={"generate": self._mode is not None})
        self.facts = replace(facts, capabilities=can)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._timeout = settings.request_timeout
        self._since: float | None = None  # start of the running batch
        self._works = True
        self._scores: Batcher[ScoreJob, SparseLogprobs] = Batcher(
            self._timed("score", self._answer_scores),
            self._thread,
            max_batch_tokens=settings.max_batch_tokens,
            max_padding=self._pass_tokens,
            observe=metrics.batch_observer("score"),
        )
        # A token more of each completion reads all weights once, however wide the prompts are
        # padded, so generations are joined at any lengths.
        self._generations: Batcher[GenerateJob, Completion] = Batcher(
            self._timed("generate", self.generate_batch),
            self._thread,
            max_batch_tokens=settings.max_batch_tokens,
            observe=metrics.batch_observer("generate"),
        )

    @property
    def alive(self) -> bool:
        """The health of the backend: False if the device is lost or the running batch hangs.

        Nobody waits for longer than the request timeout, and a batch that nobody waits for ends
        with its next token: one that runs for twice as long hangs.
        """
        since = self._since
        return self._works and (since is None or time.perf_counter() - since < 2 * self._timeout)

    async def score(self, job: ScoreJob) -> SparseLogprobs:
        self._metrics.count_prefix("score", job.tokens, 0)
        return await self._scores.submit(job)

    async def generate(self, job: GenerateJob) -> Completion:
        self._metrics.count_prefix("generate", len(job.prompt), 0)
        return await self._generations.submit(job)

    async def close(self) -> None:
        await asyncio.gather(self._scores.close(), self._generations.close())
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _answer_scores(self, jobs: Sequence[ScoreJob], callers: Callers[SparseLogprobs]) -> None:
        for index, scores in enumerate(self.score_batch(jobs)):
            callers.answer(index, scores)

    @torch.inference_mode()
    def score_batch(self, jobs: Sequence[ScoreJob]) -> list[SparseLogprobs]:
        """Score a batch, in as few forward passes as padding and the model's positions allow."""
        answers: dict[int, SparseLogprobs] = {}
        for alike in self._groups_of_lengths([job.tokens for job in jobs]):
            for some in self._split_by_adapter(alike, jobs):
                for places in within_padding([jobs[i].tokens for i in some], self._pass_tokens):
                    group = [some[place] for place in places]
                    scored = self._score_group([jobs[i] for i in group])
                    answers.update(zip(group, scored, strict=True))
        return [answers[index] for index in range(len(jobs))]

    def _split_by_adapter(
        self, indices: Sequence[int], jobs: Sequence[ScoreJob] | Sequence[GenerateJob]
    ) -> list[list[int]]:
        """Return groups of the jobs, by index, whose adapters one forward pass may hold."""
        groups = self._adapters.groups([jobs[index].adapter for index in indices])
        return [[indices[place] for place in group] for group in groups]

    def _score_group(self, jobs: Sequence[ScoreJob]) -> list[SparseLogprobs]:
        """Score a right-padded batch in one forward pass; the head sees completion positions only.

        Padding comes after every real token, where a causal model never sees it, so no mask is
        needed and each answer is that of the sequence alone. A forward pass is short, so it runs to
        its end even if nobody waits.
        """
        width = max(job.tokens for job in jobs)
        input_ids = torch.full((len(jobs), width), self._pad)  # [B, L]
        for number, job in enumerate(jobs):
            input_ids[number, : job.tokens] = torch.from_numpy(job.token_ids.astype(np.int64))
        positions = np.concatenate(
            [
                np.arange(job.completion_start - 1, job.tokens - 1) + number * width
                for number, job in enumerate(jobs)
            ]
        )
        index = torch.from_numpy(positions).to(self._device)
        with self._adapters.active([job.adapter for job in jobs]):
            states = self._states(input_ids.to(self._device)).flatten(0, 1)[index]
        head = self._project if self._split_head else torch.clone
        return score_positions(states, head, jobs, self.facts.vocab_size, self._chunk_bytes)

    def _states(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return the head's inputs, hidden states [B, L, d], or else logits [B, L, V]."""
        self._forget_lengths(input_ids.shape[1])
        if self._split_head:
            decoder = self._model.get_decoder()
            return decoder(input_ids=input_ids, use_cache=False).last_hidden_state
        return self._model(input_ids=input_ids, use_cache=False).logits

    def _forget_lengths(self, tokens: int) -> None:
        """Reset positions that an earlier, longer sequence may have changed."""
        if self._rope is not None and self._rope.keeps_lengths(tokens):
            one = torch.full((1, 1), self._pad, device=self._device)
            self._model(input_ids=one, use_cache=False)

    def _project(self, hidden: torch.Tensor) -> torch.Tensor:
        return project(self._model, hidden)

    @torch.inference_mode()
    def generate_batch(self, jobs: Sequence[GenerateJob], callers: Callers[Completion]) -> None:
        """Generate completions of any mixture of jobs; answer each when it is scored."""
        for group, use_cache in self._generation_groups(jobs):
            delivery = _Delivery(self.score_batch, jobs, group, callers)
            self._forget_lengths(max(jobs[i].tokens for i in group))
            with self._adapters.active([jobs[i].adapter for i in group]):
                generate_completions(
                    self._model,
                    [jobs[i] for i in group],
                    self.facts.eos_token_ids,
                    self._pad,
                    delivery.waiting,
                    delivery.ended,
                    vocab_size=self.facts.tokenizer.vocab_size,
                    tokenizer=self._tokenizer,
                    use_cache=use_cache,
                )
            delivery.score()

    def _generation_groups(self, jobs: Sequence[GenerateJob]) -> list[tuple[list[int], bool]]:
        """Return groups of jobs, by index, that are generated together, and whether with a cache.

        A completion whose positions may change while it grows is generated alone and without a
        cache, because cached keys would keep the old positions.
        """
        rope = self._rope
        groups: list[tuple[list[int], bool]] = []
        steady: dict[int, list[int]] = {}
        for index, job in enumerate(jobs):
            regime = 0 if rope is None else rope.regime(job.tokens)
            if rope is not None and rope.regime(len(job.prompt)) != regime:
                groups.append(([index], False))
            else:
                steady.setdefault(regime, []).append(index)
        for some in steady.values():
            if self._mode != "batched":
                groups += [([i], self._mode == "alone") for i in some]
                continue
            for part in self._split_by_adapter(some, jobs):
                within = within_context([jobs[i] for i in part], self.facts.max_model_len)
                groups += [([part[place] for place in group], True) for group in within]
        return groups

    def _timed(self, name: str, run: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
        def timed(jobs: Any, callers: Any) -> None:
            self._since = since = time.perf_counter()
            try:
                run(jobs, callers)
            except torch.AcceleratorError:
                self._works = _computes(self._device)
                raise
            except (MemoryError, RuntimeError) as error:
                if not _is_out_of_memory(error):
                    raise
                self._metrics.out_of_memory.labels(name).inc()
                if len(jobs) > 1:
                    raise
                raise PayloadTooLargeError(
                    f"{jobs[0].tokens} tokens do not fit the teacher's memory, even alone in a "
                    "batch; send a shorter sequence"
                ) from None
            finally:
                self._since = None
                self._metrics.forward_seconds.labels(name).observe(time.perf_counter() - since)

        return timed


class _Delivery:
    """A delivery of finished completions to their callers, scored if the job asks for it.

    Args:
        score: scores a batch of jobs.
        jobs: of the whole batch.
        group: indices of the jobs in this generation.
        callers: of the whole batch.
    """

    def __init__(
        self,
        score: Callable[[Sequence[ScoreJob]], list[SparseLogprobs]],
        jobs: Sequence[GenerateJob],
        group: Sequence[int],
        callers: Callers[Completion],
    ) -> None:
        self._score = score
        self._jobs = jobs
        self._group = group
        self._callers = callers
        self._unscored: dict[int, Completion] = {}
        self._tokens = 0

    def waiting(self) -> list[bool]:
        flags = self._callers.waiting()
        return [flags[index] for index in self._group]

    def ended(self, completions: dict[int, Completion]) -> None:
        """Take the completions that the last token ended, by their index in the group."""
        for place, completion in completions.items():
            index = self._group[place]
            if self._jobs[index].score is None:
                self._callers.answer(index, completion)
            else:
                self._unscored[index] = completion
        self._tokens += 1
        if self._tokens % SCORE_EVERY == 0:
            self.score()

    def score(self) -> None:
        """Score the finished completions in one batch, and answer them."""
        done, self._unscored = self._unscored, {}
        if not done:
            return
        scored = self._score([self._jobs[i].score_job(c.token_ids) for i, c in done.items()])
        for (index, completion), scores in zip(done.items(), scored, strict=True):
            self._callers.answer(index, completion.model_copy(update={"scores": scores}))


def project(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Return logits [n, V] of hidden states [n, d], scaled and capped as the config says."""
    config = model.config.get_text_config()
    logits = model.get_output_embeddings()(hidden)
    if getattr(config, "logit_scale", None):  # Cohere
        logits = logits * config.logit_scale
    if getattr(config, "logits_scaling", None):  # Granite
        logits = logits / config.logits_scaling
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma
    return logits if not cap else cap * torch.tanh(logits / cap)


@torch.inference_mode()
def _head_is_separable(model: Any) -> bool:
    """Return whether decoder and `project` give the model's own logits of eight tokens."""
    head: Any = model.get_output_embeddings()
    vocab_size = int(head.weight.shape[0])
    input_ids = torch.arange(8, device=head.weight.device)[None] % vocab_size  # [1, 8]
    theirs = model(input_ids=input_ids, use_cache=False).logits.float()
    try:
        hidden = model.get_decoder()(input_ids=input_ids, use_cache=False).last_hidden_state
        ours = project(model, hidden).float()
        same = torch.allclose(ours, theirs, atol=1e-5 * float(theirs.abs().max()), rtol=1e-5)
    except (AttributeError, TypeError, RuntimeError):  # no decoder of the usual shape
        same = False
    if not same:
        logger.warning("Unknown output layer: scoring from the model's own logits of all positions")
    return same


def _computes(device: torch.device) -> bool:
    """Return whether a device still computes; after some errors a GPU never does again."""
    try:
        return float(torch.ones(1, device=device).sum()) == 1.0
    except RuntimeError as error:
        logger.error("The device is lost: %s", error)
        return False


def _is_out_of_memory(error: Exception) -> bool:
    # torch's CPU allocator raises a plain RuntimeError.
    known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return known or "can't allocate memory" in str(error)


def _load_model(settings: Settings) -> Any:
    device = settings.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError("--device cuda: torch sees no GPU here; use --device cpu")
    model, report = from_pretrained(
        AutoModelForCausalLM,
        settings.model,
        trust_remote_code=settings.trust_remote_code,
        dtype=settings.dtype,
        output_loading_info=True,
    )
    missing = sorted(report["missing_keys"])
    if missing:  # transformers would use random weights in their place
        raise ConfigurationError(
            f"{settings.model} lacks {len(missing)} weights of {type(model).__name__}, "
            f"{missing[0]} among them; give a complete checkpoint of a causal language model"
        )
    return model.to(device).eval()


def _facts(settings: Settings, model: Any, tokenizer: Any) -> BackendFacts:
    context = int(getattr(model.config.get_text_config(), "max_position_embeddings", 0) or 1 << 20)
    limit = settings.max_model_len or context
    if limit > context:
        raise ConfigurationError(
            f"--max-model-len {limit} is over the model's context of {context}"
        )
    teacher = TeacherIdentity(
        model=settings.name,
        fingerprint=model_fingerprint(local_folder(settings.model)),
        dtype=str(model.dtype).removeprefix("torch."),
        backend="transformers",
        version=version("transformers"),
    )
    return BackendFacts(
        teacher=teacher,
        adapters=adapter_identities(teacher, settings.adapters),
        tokenizer=tokenizer_identity(tokenizer),
        vocab_size=int(model.get_output_embeddings().weight.shape[0]),
        max_model_len=limit,
        eos_token_ids=eos_token_ids(model.generation_config, tokenizer),
        capabilities=Capabilities(
            temperature=True, requested_token_ids=True, generate=True, sample_seed=True
        ),
    )

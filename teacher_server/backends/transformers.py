"""The teacher on plain transformers: any causal language model, CPU or GPU."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from shared.errors import ConfigurationError
from shared.identity import model_fingerprint, tokenizer_identity
from shared.protocol import Capabilities, Completion, TeacherIdentity
from shared.sparse import SparseLogprobs
from teacher_server.backends.base import BackendFacts, GenerateJob, ScoreJob
from teacher_server.backends.checkpoint import eos_token_ids, from_pretrained, local_folder
from teacher_server.backends.generation import generate_rows, within_context
from teacher_server.backends.scoring import score_rows
from teacher_server.batcher import Batcher, Wanted
from teacher_server.metrics import Metrics
from teacher_server.settings import Settings

logger = logging.getLogger(__name__)


class TransformersBackend:
    """One model, one worker thread, two queues: scoring and generation take turns.

    Args:
        settings: model, dtype, device and batch budget.
        metrics: is told batch sizes and forward times.

    Raises:
        ConfigurationError: the model does not load.
    """

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._metrics = metrics
        self._model = _load_model(settings)
        self._device = next(self._model.parameters()).device
        tokenizer = from_pretrained(
            AutoTokenizer, settings.model, trust_remote_code=settings.trust_remote_code
        )
        self.facts = _facts(settings, self._model, tokenizer)
        pad = tokenizer.pad_token_id
        self._pad = int(pad if pad is not None else (*self.facts.eos_token_ids, 0)[0])
        self._split_head = _head_is_separable(self._model)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._scores: Batcher[ScoreJob, SparseLogprobs] = Batcher(
            self._timed("score", self.score_batch),
            self._thread,
            max_batch_tokens=settings.max_batch_tokens,
            observe=metrics.batch_observer("score"),
        )
        self._generations: Batcher[GenerateJob, Completion] = Batcher(
            self._timed("generate", self.generate_batch),
            self._thread,
            max_batch_tokens=settings.max_batch_tokens,
            observe=metrics.batch_observer("generate"),
        )

    @property
    def alive(self) -> bool:
        return True  # the model is in this process

    async def score(self, job: ScoreJob) -> SparseLogprobs:
        return await self._scores.submit(job)

    async def generate(self, job: GenerateJob) -> Completion:
        return await self._generations.submit(job)

    async def close(self) -> None:
        await asyncio.gather(self._scores.close(), self._generations.close())
        self._thread.shutdown(wait=False, cancel_futures=True)

    @torch.inference_mode()
    def score_batch(
        self, jobs: Sequence[ScoreJob], wanted: Wanted | None = None
    ) -> list[SparseLogprobs]:
        """One forward pass over the right-padded batch; only completion rows meet the head.

        Padding stands behind every real token, which a causal model never sees, so no mask is
        needed and each answer is that of the sequence alone. A forward pass is short, so it runs
        to its end whoever still waits.
        """
        width = max(job.tokens for job in jobs)
        input_ids = torch.full((len(jobs), width), self._pad)  # [B, L]
        for row, job in enumerate(jobs):
            input_ids[row, : job.tokens] = torch.from_numpy(job.token_ids.astype(np.int64))
        rows = np.concatenate(
            [
                np.arange(job.completion_start - 1, job.tokens - 1) + row * width
                for row, job in enumerate(jobs)
            ]
        )
        index = torch.from_numpy(rows).to(self._device)
        input_ids = input_ids.to(self._device)
        vocab_size = self.facts.vocab_size
        if self._split_head:
            decoder = self._model.get_decoder()
            hidden = decoder(input_ids=input_ids, use_cache=False).last_hidden_state  # [B, L, d]
            return score_rows(hidden.flatten(0, 1)[index], self._project, jobs, vocab_size)
        logits = self._model(input_ids=input_ids, use_cache=False).logits  # [B, L, V]
        return score_rows(logits.flatten(0, 1)[index], torch.clone, jobs, vocab_size)

    def _project(self, hidden: torch.Tensor) -> torch.Tensor:
        return project(self._model, hidden)

    @torch.inference_mode()
    def generate_batch(
        self, jobs: Sequence[GenerateJob], wanted: Wanted | None = None
    ) -> list[Completion]:
        """Completions of any mixture of jobs, each scored if it asks for it."""
        completions: dict[int, Completion] = {}
        for group in within_context(jobs, self.facts.max_model_len):

            def still_wanted(group: list[int] = group) -> list[bool]:
                flags = [True] * len(jobs) if wanted is None else wanted()
                return [flags[i] for i in group]

            done = generate_rows(
                self._model,
                [jobs[i] for i in group],
                self.facts.eos_token_ids,
                self._pad,
                still_wanted,
                vocab_size=self.facts.tokenizer.vocab_size,
            )
            completions.update(zip(group, done, strict=True))
        return self._with_scores(jobs, [completions[i] for i in range(len(jobs))])

    def _with_scores(
        self, jobs: Sequence[GenerateJob], completions: list[Completion]
    ) -> list[Completion]:
        wanted = [i for i, job in enumerate(jobs) if job.score is not None]
        if not wanted:
            return completions
        scored = self.score_batch([jobs[i].score_job(completions[i].token_ids) for i in wanted])
        for i, scores in zip(wanted, scored, strict=True):
            completions[i] = completions[i].model_copy(update={"scores": scores})
        return completions

    def _timed(self, name: str, run: Callable[[Any, Wanted], Any]) -> Callable[[Any, Wanted], Any]:
        def timed(jobs: Any, wanted: Wanted) -> Any:
            since = time.perf_counter()
            try:
                return run(jobs, wanted)
            finally:
                self._metrics.forward_seconds.labels(name).observe(time.perf_counter() - since)

        return timed


def project(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Logits [n, V] of hidden states [n, d], with what the config says is done to them."""
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
    """Whether decoder + `project` give the model's own logits; tried on eight tokens."""
    head: Any = model.get_output_embeddings()
    rows = int(head.weight.shape[0])
    input_ids = torch.arange(8, device=head.weight.device)[None] % rows  # [1, 8]
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
    if missing:  # transformers would go on with random weights in their place
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
    return BackendFacts(
        teacher=TeacherIdentity(
            model=settings.served_model_name or settings.model,
            fingerprint=model_fingerprint(local_folder(settings.model)),
            dtype=str(model.dtype).removeprefix("torch."),
            backend="transformers",
            version=version("transformers"),
        ),
        tokenizer=tokenizer_identity(tokenizer),
        vocab_size=int(model.get_output_embeddings().weight.shape[0]),
        max_model_len=limit,
        eos_token_ids=eos_token_ids(model.generation_config, tokenizer),
        capabilities=Capabilities(temperature=True, requested_token_ids=True, generate=True),
    )

"""A backend on vLLM, with its engine in a process of its own.

Scoring is one prefill of ``token_ids[:-1]`` with one sampled token that nobody reads, scored inside
the worker by `teacher_server.backends.vllm_worker`. A self-test at start-up finds out whether the
hooks there fit this vLLM. If not, scoring falls back to vLLM's public prompt log-probs: slower, at
temperature 1, without requested ids, and `/v1/info` says so.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import AsyncGenerator, Coroutine, Iterator
from dataclasses import replace
from typing import Any, Literal, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from shared.errors import (
    ConfigurationError,
    InternalError,
    InvalidRequestError,
    UnavailableError,
)
from shared.protocol import Completion, FinishReason
from shared.sampling import uniforms
from shared.sparse import SparseLogprobs
from shared.text import StopSearch
from teacher_server.backends.base import GenerateJob, ScoreJob
from teacher_server.backends.checkpoint import (
    load_tokenizer,
)
from teacher_server.backends.vllm_engine import (
    engine_arguments,
    engine_facts,
    lora_request,
    start_engine,
)
from teacher_server.backends.vllm_worker import (
    MissedPositionsError,
    pack_job,
    unpack_scores,
)
from teacher_server.limits.fairness import LEAST_JOB_TOKENS, FairQueue
from teacher_server.metrics import Metrics
from teacher_server.settings import Settings

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Temperatures at which vLLM samples: it silently changes lower ones and refuses higher ones.
COLDEST, HOTTEST = 0.01, 2.0
# Largest difference in log-prob that the self-test allows between the two scoring paths.
SELF_TEST_TOLERANCE = {"float32": 1e-4, "float16": 0.05, "bfloat16": 0.25}
# Prompt tokens from which on scoring looks for the prompt in the prefix cache: two blocks of vLLM.
LEAST_SHARED = 32
# The least tail that the public path can tell from none, by the resolution of float32 near 1.
LEAST_TAIL = float(np.log(2.0**-24))


class VllmBackend:
    """A backend on vLLM's AsyncLLM; batching, chunked prefill and parallelism are the engine's own.

    Args:
        settings: model, dtype, limits and the engine's own flags.
        metrics: records the tokens of each job.
        loop: the running event loop that jobs will come from. The constructor waits for work in it,
            so it must run in another thread.

    Raises:
        ConfigurationError: vLLM refuses a flag or the model.
    """

    def __init__(
        self, settings: Settings, metrics: Metrics, loop: asyncio.AbstractEventLoop
    ) -> None:
        # Loaded before the engine, which takes minutes, so that a tokenizer that loses text fails
        # at once.
        self._tokenizer = load_tokenizer(
            settings.model, trust_remote_code=settings.trust_remote_code
        )
        arguments = engine_arguments(settings)
        self._engine = start_engine(settings, arguments)
        self._ids = itertools.count()
        self._adapters = {
            module.name: lora_request(number, module)
            for number, module in enumerate(settings.adapters, 1)
        }
        self._running: set[asyncio.Task[Any]] = set()
        self._closing = False
        self._metrics = metrics
        self._tokens = metrics.batch_tokens
        self._fair_queue = FairQueue(LEAST_JOB_TOKENS)
        self._in_worker = True
        self._chunk_bytes = settings.score_chunk_mib << 20
        config = self._engine.vllm_config.model_config
        self._vocab_size = int(config.get_vocab_size())
        self._block_size = int(self._engine.vllm_config.cache_config.block_size)
        try:
            self._in_worker = _wait(self._hooks_work(int(config.max_model_len)), loop)
            _wait(self._check_adapters(int(config.max_model_len)), loop)
            self.facts = engine_facts(
                settings, config, arguments, self._tokenizer, self._vocab_size, self._in_worker
            )
        except BaseException:
            self._engine.shutdown()
            raise

    @property
    def alive(self) -> bool:
        return self._closing or not self._engine.errored

    async def score(self, job: ScoreJob) -> SparseLogprobs:
        with self._turn(job) as priority:
            return await self._score(job, priority)

    async def _score(self, job: ScoreJob, priority: int) -> SparseLogprobs:
        self._tokens.labels("score").inc(job.tokens)
        score = self._score_in_worker if self._in_worker else self._score_publicly
        return await score(job, priority)

    @contextlib.contextmanager
    def _turn(self, job: ScoreJob | GenerateJob) -> Iterator[int]:
        """Yield the job's priority in the engine's queue, where the lowest is next."""
        start = self._fair_queue.start(job.client, job.tokens)
        try:
            yield start
        except asyncio.CancelledError:
            self._fair_queue.dropped(job.client, job.tokens)
            raise
        self._fair_queue.begun(start)  # told late, because only the engine knows when it began

    async def generate(self, job: GenerateJob) -> Completion:
        if job.temperature and not COLDEST <= job.temperature <= HOTTEST:
            raise InvalidRequestError(
                f"temperature {job.temperature:g}: vLLM samples from {COLDEST} to {HOTTEST}; use 0 "
                "for greedy decoding",
                field="temperature",
            )
        with self._turn(job) as priority:
            return await self._generate(job, priority)

    async def _generate(self, job: GenerateJob, priority: int) -> Completion:
        self._tokens.labels("generate").inc(job.tokens)
        search = None if job.stop is None else StopSearch(self._tokenizer, job.prompt, job.stop)
        ids, reason = await self._generate_ids(
            job.prompt.tolist(),
            priority,
            self._lora(job),
            search,
            max_tokens=job.max_new_tokens,
            temperature=job.temperature,
            top_p=job.top_p,
            top_k=job.sampling_top_k,
            seed=int(uniforms("vllm", *job.key, count=1)[0] * 2**53),
            stop_token_ids=sorted({*self.facts.eos_token_ids, *job.stop_token_ids}),
            logit_bias=self._padding_bias(),
        )
        if reason not in ("stop", "length"):
            raise InternalError(f"vLLM ended a generation with {reason!r}")
        # Scored by a prefill, which is cheap beside decoding and exact in tail and temperature;
        # log-probs kept while decoding would not be.
        scores = None if job.score is None else await self._score(job.score_job(ids), priority)
        return Completion(token_ids=ids, finish_reason=cast(FinishReason, reason), scores=scores)

    def _padding_bias(self) -> dict[int, float] | None:
        """Return logit biases that keep padding of the output layer from being sampled."""
        padding = range(self.facts.tokenizer.vocab_size, self._vocab_size)
        return dict.fromkeys(padding, -100.0) or None

    async def close(self) -> None:
        self._closing = True
        # The engine's reader is cancelled first, because it would log the engine's end as an error.
        reader = self._engine.output_handler
        for task in {*self._running, *([] if reader is None else [reader])}:
            task.cancel()
        await asyncio.gather(*self._running, *([] if reader is None else [reader]),
                             return_exceptions=True)  # fmt: skip
        await asyncio.to_thread(self._engine.shutdown)
        del self._engine

    async def _score_in_worker(self, job: ScoreJob, priority: int = 0) -> SparseLogprobs:
        # The state of the prompt's last token scores the first of the completion, and is cached
        # where a block ends with it.
        aligned = job.completion_start % self._block_size == 0
        if job.completion_start > LEAST_SHARED and not aligned:
            with contextlib.suppress(MissedPositionsError):
                return await self._prefill(job, priority, cached=True)
        return await self._prefill(job, priority, cached=False)

    async def _prefill(self, job: ScoreJob, priority: int, *, cached: bool) -> SparseLogprobs:
        """Score by one prefill, which may begin with what the prefix cache holds of the prompt.

        Raises:
            MissedPositionsError: the cache held completion positions too, so they were not scored.
        """
        output = await self._run(
            job.token_ids[:-1].tolist(),
            priority,
            self._lora(job),
            max_tokens=1,
            temperature=0.0,
            extra_args=pack_job(job),
            skip_reading_prefix_cache=not cached,
        )
        data = output.prompt_token_id_logprobs
        if data is None:
            raise InternalError("vLLM answered without scores")
        try:
            return unpack_scores(data, job)
        except MissedPositionsError:
            if cached:
                raise
            raise InternalError("vLLM computed only some of the positions") from None
        except RuntimeError as error:
            raise InternalError(str(error)) from error

    async def _score_publicly(self, job: ScoreJob, priority: int = 0) -> SparseLogprobs:
        """Score by vLLM's ``prompt_logprobs``, at temperature 1 and without requested ids."""
        output = await self._run(
            job.token_ids.tolist(),
            priority,
            self._lora(job),
            max_tokens=1,
            temperature=0.0,
            prompt_logprobs=job.top_k,
            flat_logprobs=True,
        )
        flat, columns = output.prompt_logprobs, job.top_k + 1
        first = flat.start_indices[job.completion_start]
        # [T, 1 + k]: the token that came next, then the top k.
        ids = np.asarray(flat.token_ids[first:], np.uint32).reshape(job.rows, columns)
        logprobs = np.asarray(flat.logprobs[first:], np.float32).reshape(job.rows, columns)
        return public_scores(ids, logprobs, job, self._vocab_size)

    def _lora(self, job: ScoreJob | GenerateJob) -> Any:
        """Return the job's adapter as vLLM names it; None for the base model."""
        return None if job.adapter is None else self._adapters[job.adapter]

    async def _run(self, prompt: list[int], priority: int, lora: Any, **params: Any) -> Any:
        """Return the engine's final `RequestOutput`; cancelling aborts the engine's request.

        Raises:
            UnavailableError: the engine is dead.
        """
        async with contextlib.aclosing(self._outputs(prompt, priority, lora, **params)) as outputs:
            async for output in outputs:
                return output
        raise InternalError("vLLM answered nothing")

    async def _generate_ids(
        self,
        prompt: list[int],
        priority: int,
        lora: Any,
        search: StopSearch | None,
        **params: Any,
    ) -> tuple[NDArray[np.uint32], str | None]:
        """Generate token ids and return them with their finish reason; a stop string ends them."""
        ids: list[int] = []
        streamed = search is not None
        outputs = self._outputs(prompt, priority, lora, "generate", streamed=streamed, **params)
        async with contextlib.aclosing(outputs):
            async for output in outputs:
                [generated] = output.outputs
                for token_id in generated.token_ids:
                    ids.append(int(token_id))
                    if search is not None and search.add(token_id):
                        return np.asarray(ids, np.uint32), "stop"
                if output.finished:
                    return np.asarray(ids, np.uint32), generated.finish_reason
        raise InternalError("vLLM answered nothing")

    async def _outputs(
        self,
        prompt: list[int],
        priority: int,
        lora: Any,
        kind: Literal["score", "generate"] = "score",
        *,
        streamed: bool = False,
        **params: Any,
    ) -> AsyncGenerator[Any, None]:
        """Yield the engine's final output or, if ``streamed``, an output for each new token.

        Closed or cancelled before the end, it aborts the engine's request. Only requests of one
        ``kind`` share the prefix cache: a completion in it would hide its positions when it is
        scored.

        Raises:
            UnavailableError: the engine is dead.
        """
        from vllm import SamplingParams
        from vllm.inputs import tokens_input
        from vllm.sampling_params import RequestOutputKind
        from vllm.v1.engine.exceptions import EngineDeadError

        output_kind = RequestOutputKind.DELTA if streamed else RequestOutputKind.FINAL_ONLY
        sampling = SamplingParams(
            **params, detokenize=False, output_kind=output_kind, skip_clone=True
        )
        task = asyncio.current_task()
        assert task is not None
        self._running.add(task)
        counted = False
        answers = self._engine.generate(
            tokens_input(prompt, cache_salt=None if kind == "score" else kind),
            sampling,
            f"teacher-{next(self._ids)}",
            lora_request=lora,
            priority=priority,
        )
        try:
            async with contextlib.aclosing(answers):  # leaving it early aborts the request
                async for output in answers:
                    if not counted:
                        counted = True
                        cached = output.num_cached_tokens or 0
                        self._metrics.count_prefix(kind, len(prompt), cached)
                    yield output
        except EngineDeadError as error:
            raise UnavailableError("vLLM's engine is dead; restart the server") from error
        except asyncio.CancelledError:
            if self._closing:
                raise UnavailableError("the server is shutting down") from None
            raise
        finally:
            self._running.discard(task)

    async def _hooks_work(self, max_model_len: int) -> bool:
        """Return whether the workers score as they should; log the reason if not."""
        try:
            await self._engine.collective_rpc("spare_generators")
            runners = await self._engine.collective_rpc(
                "install_scoring", args=(self._vocab_size, self._chunk_bytes)
            )
            difference = await self._largest_difference(max_model_len)
        except Exception as error:
            if self._engine.errored:
                raise InternalError(
                    f"vLLM's engine failed its first request ({error}); its last error above says "
                    "why. --backend transformers serves the model without vLLM"
                ) from error
            logger.warning(
                "Scoring inside vLLM's workers fails (%s): falling back to its public prompt "
                "log-probs, which are slower, at temperature 1 and without requested ids",
                str(error) or type(error).__name__,
            )
            return False
        logger.info(
            "Scoring inside vLLM's workers (model runner %s), within %.1e of its own log-probs",
            runners[0], difference,
        )  # fmt: skip
        return True

    async def _check_adapters(self, max_model_len: int) -> None:
        """Check that each adapter, and the base model, scores in a mixed batch as it does alone.

        Raises:
            ConfigurationError: this vLLM confuses them, or an adapter changes nothing: weights
                whose names fit no layer are left out by vLLM without a word.
        """
        if not self._adapters:
            return
        job = self._short_job(max_model_len)
        jobs = [replace(job, adapter=name) for name in (None, *self._adapters)]
        alone = [await self.score(one) for one in jobs]
        for one, scores in zip(jobs[1:], alone[1:], strict=True):
            if np.array_equal(scores.next_token_logprob, alone[0].next_token_logprob):
                raise ConfigurationError(
                    f"--lora-modules {one.adapter}=…: vLLM answers as the base model does, so no "
                    "weight of the adapter fits it; merge it (student-trainer merge) and serve it "
                    "alone"
                )
        together = await asyncio.gather(*map(self.score, jobs))
        differences = [
            float(np.abs(one.next_token_logprob - other.next_token_logprob).max())
            for one, other in zip(alone, together, strict=True)
        ]
        if not max(differences) <= self._tolerance:
            raise ConfigurationError(
                f"--lora-modules: this vLLM confuses adapters that share a batch (log-probs differ "
                f"by {max(differences):.2g}); merge them and serve each alone, or use --backend "
                "transformers"
            )

    @property
    def _tolerance(self) -> float:
        """The largest difference in log-prob that rounding explains."""
        dtype = str(self._engine.vllm_config.model_config.dtype).removeprefix("torch.")
        return SELF_TEST_TOLERANCE.get(dtype, 0.25)

    def _short_job(self, max_model_len: int) -> ScoreJob:
        """Return a job of up to 24 tokens, for self-tests."""
        length = min(24, max_model_len - 1)
        ids = (np.arange(length, dtype=np.uint32) * 7 + 3) % self._vocab_size
        return ScoreJob(ids, completion_start=1, top_k=min(8, self._vocab_size))

    async def _largest_difference(self, max_model_len: int) -> float:
        """Return the largest difference in log-prob between both scoring paths on a short sequence.

        Raises:
            InternalError: it is over the tolerance.
        """
        job = self._short_job(max_model_len)
        ours, theirs = await self._score_in_worker(job), await self._score_publicly(job)
        difference = max(
            float(np.abs(ours.logprobs - theirs.logprobs).max()),
            float(np.abs(ours.next_token_logprob - theirs.next_token_logprob).max()),
        )
        if not difference <= self._tolerance:
            raise InternalError(f"the log-probs differ by {difference:.2g} from vLLM's own")
        return difference


def public_scores(
    ids: np.ndarray, logprobs: np.ndarray, job: ScoreJob, vocab_size: int
) -> SparseLogprobs:
    """Return scores from vLLM's own prompt log-probs, [T, 1 + k] with the next token first.

    The tail is 1 − the named mass as far as float32 resolves it: never below `LEAST_TAIL`, and −inf
    only where every token is named.
    """
    following = job.token_ids[job.completion_start :]
    if not (ids[:, 0] == following).all():
        raise InternalError("vLLM's prompt log-probs are not those of the tokens sent")
    beside = ~(ids[:, 1:] == following[:, None]).any(axis=1)  # next token not in the top k
    mass = np.exp(logprobs[:, 1:].astype(np.float64)).sum(axis=1)
    mass += np.where(beside, np.exp(logprobs[:, 0].astype(np.float64)), 0.0)
    tail = np.log(np.maximum(1.0 - mass, np.exp(LEAST_TAIL)))
    tail[job.top_k + beside >= vocab_size] = -np.inf
    top = np.ascontiguousarray(logprobs[:, 1:])
    if job.logprob_dtype == "float16":
        top = np.maximum(top, np.finfo(np.float16).min).astype(np.float16)
    return SparseLogprobs(
        token_ids=np.ascontiguousarray(ids[:, 1:]),
        logprobs=top,
        next_token_logprob=np.ascontiguousarray(logprobs[:, 0]),
        tail_logprob=tail.astype(np.float32),
    )


def _wait(work: Coroutine[Any, Any, T], loop: asyncio.AbstractEventLoop) -> T:
    return asyncio.run_coroutine_threadsafe(work, loop).result()

"""Score prompts inside vLLM's workers, where the hidden states are.

vLLM's own prompt log-probs project every prompt position, know neither temperature nor tail, and
end as Python objects. Here only the completion positions reach the output layer, in
`teacher_server.backends.scoring` as on every other backend. The answer leaves as one buffer of
bytes in ``prompt_token_id_logprobs``, a field that vLLM ships as an array from the worker to
`RequestOutput`.

Memory: logits for scoring are outside what vLLM measures when it sizes its KV cache, and a full
batch of 8,192 positions over 152k tokens would be 8,192 × 152,000 × 4 bytes = 4.98 GB in float32.
So positions are projected in chunks of ``--score-chunk-mib`` (128 MiB of float32 logits are 220
positions at 152k), and each chunk of a prefill is scored in the step that computed it, so no hidden
states are kept. With the logits, their exponentials and the top-k's work space a step needs about 4
× 128 MiB = 0.5 GiB beside vLLM's own, whatever the batch. It comes out of what
``--gpu-memory-utilization`` leaves free.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from shared.sparse import SparseLogprobs
from shared.vllm_sampling import SeededSampling
from teacher_server.backends.base import ScoreJob
from teacher_server.backends.compat import (
    checked_method,
    is_first_runner,
    prompt_logprobs_method,
    replace_prompt_logprobs_method,
    runner_output,
)
from teacher_server.backends.scoring import CHUNK_BYTES, Head, score_positions

logger = logging.getLogger(__name__)

# The key of ``SamplingParams.extra_args`` under which a job travels to the workers.
JOB = "teacher_score"

_SCORED, _FAILED, _MISSED = 0, 1, 2


class MissedPositionsError(RuntimeError):
    """A completion position was read from the prefix cache, where it has no hidden state."""


def pack_job(job: ScoreJob) -> dict[str, Any]:
    """Return the ``extra_args`` of the request whose prompt is ``job.token_ids[:-1]``.

    The last token predicts nothing that is scored, so the engine never sees it.
    """
    requested = job.requested_token_ids
    return {
        JOB: {
            "start": job.completion_start,
            "completion": job.token_ids[job.completion_start :].astype("<u4").tobytes(),
            "top_k": job.top_k,
            "temperature": job.temperature,
            "width": None if requested is None else int(requested.shape[1]),
            "requested": None if requested is None else requested.astype("<u4").tobytes(),
            "dtype": job.logprob_dtype,
            "draw_key": job.draw_key,
        }
    }


def unpack_job(packed: Mapping[str, Any]) -> ScoreJob:
    """Return the job that `pack_job` packed, with zeros in place of its prompt's ids."""
    completion = np.frombuffer(packed["completion"], dtype="<u4")
    requested = None
    if packed["requested"] is not None:
        requested = np.frombuffer(packed["requested"], dtype="<u4")
        requested = requested.reshape(len(completion), packed["width"])
    return ScoreJob(
        token_ids=np.concatenate([np.zeros(packed["start"], np.uint32), completion]),
        completion_start=packed["start"],
        top_k=packed["top_k"],
        temperature=packed["temperature"],
        requested_token_ids=requested,
        logprob_dtype=packed["dtype"],
        draw_key=packed["draw_key"],
    )


def pack_scores(parts: Sequence[SparseLogprobs]) -> torch.Tensor:
    """Return [bytes] uint8: a status word, then the arrays of consecutive parts, in C order."""
    buffers = [np.array([_SCORED], "<u4").tobytes()]
    for name in _fields(parts[0].requested_logprobs is not None):
        buffers.extend(np.ascontiguousarray(getattr(part, name)).tobytes() for part in parts)
    return torch.frombuffer(bytearray(b"".join(buffers)), dtype=torch.uint8)


def pack_failure(message: str, status: int = _FAILED) -> torch.Tensor:
    """Return [bytes] uint8: a status word, then an error message."""
    data = np.array([status], "<u4").tobytes() + message.encode()
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def unpack_scores(data: NDArray[np.uint8], job: ScoreJob) -> SparseLogprobs:
    """Return the scores of ``job``, as views into ``data``.

    Raises:
        MissedPositionsError: the prefix cache held some of its positions.
        RuntimeError: the worker answered a failure; carries its message.
    """
    status = int(data[:4].view("<u4")[0])
    if status != _SCORED:
        kind = MissedPositionsError if status == _MISSED else RuntimeError
        raise kind(bytes(data[4:]).decode(errors="replace"))
    positions, k, requested = job.rows, job.top_k, job.requested_token_ids
    logprob = np.dtype("<f2" if job.logprob_dtype == "float16" else "<f4")
    width = 0 if requested is None else int(requested.shape[1])
    shapes: dict[str, tuple[tuple[int, ...], np.dtype[Any]]] = {
        "token_ids": ((positions, k), np.dtype("<u4")),
        "logprobs": ((positions, k), logprob),
        "next_token_logprob": ((positions,), np.dtype("<f4")),
        "tail_logprob": ((positions,), np.dtype("<f4")),
        "requested_logprobs": ((positions, width), logprob),
    }
    wanted = {name: shapes[name] for name in _fields(requested is not None)}
    sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in wanted.values()]
    if data.nbytes != 4 + sum(sizes):
        raise RuntimeError(f"{data.nbytes} bytes of scores came, not {4 + sum(sizes)}")
    arrays: dict[str, Any] = {}
    offset = 4
    for (name, (shape, dtype)), size in zip(wanted.items(), sizes, strict=True):
        arrays[name] = data[offset : offset + size].view(dtype).reshape(shape)
        offset += size
    return SparseLogprobs(**arrays)


def _fields(requested: bool) -> tuple[str, ...]:
    names = ("token_ids", "logprobs", "next_token_logprob", "tail_logprob")
    return (*names, "requested_logprobs") if requested else names


@dataclass(frozen=True)
class Span:
    """The tokens of one request in one step of the model.

    Attributes:
        offset: index of the first one in the step's hidden states.
        position: position of the first one in the sequence.
        count: how many.
    """

    request_id: str
    offset: int
    position: int
    count: int


@dataclass
class _Request:
    job: ScoreJob
    parts: list[SparseLogprobs] = field(default_factory=list)
    positions: int = 0  # scored so far
    missed: bool = False  # a position was not computed
    failure: str | None = None


class StepScorer:
    """A scorer of the completion positions that each step of the model computes.

    A request's positions may come in several steps (chunked prefill) and again from the first one
    (preemption).

    Args:
        head: projects hidden states [n, d] to logits [n, V], on every tensor-parallel rank.
        vocab_size: V.
        chunk_bytes: of float32 logits made at once.
    """

    def __init__(self, head: Head, vocab_size: int, chunk_bytes: int = CHUNK_BYTES) -> None:
        self._head = head
        self._vocab_size = vocab_size
        self._chunk_bytes = chunk_bytes
        self._requests: dict[str, _Request] = {}

    def add(self, request_id: str, sampling_params: Any) -> None:
        """Remember the job that the request carries, if it carries one."""
        packed = (getattr(sampling_params, "extra_args", None) or {}).get(JOB)
        if packed is not None:
            self._requests[request_id] = _Request(unpack_job(packed))

    def drop(self, request_id: str) -> None:
        self._requests.pop(request_id, None)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._requests

    def score(self, hidden: torch.Tensor, spans: Iterable[Span]) -> dict[str, torch.Tensor]:
        """Return packed answers, [bytes] uint8, of requests that ``hidden`` [N, d] completes."""
        work: list[tuple[_Request, ScoreJob, slice]] = []
        reached = [span for span in spans if span.request_id in self._requests]
        for span in reached:
            request = self._requests[span.request_id]
            job = request.job
            first = max(job.completion_start - 1, span.position)
            last = min(job.tokens - 1, span.position + span.count)
            if first >= last:
                continue
            index = first - (job.completion_start - 1)
            if index == 0:
                request.parts, request.positions, request.failure = [], 0, None
            elif index != request.positions:
                request.missed = True
                request.failure = f"position {index} came after {request.positions} positions"
                continue
            part = _part_of(job, index, last - first)
            where = span.offset + first - span.position
            work.append((request, part, slice(where, where + last - first)))
            request.positions += last - first
        self._score(hidden, work)
        answers = {}
        for span in reached:
            request = self._requests[span.request_id]
            if request.positions == request.job.rows or request.failure is not None:
                answers[span.request_id] = (
                    pack_scores(request.parts)
                    if request.failure is None
                    else pack_failure(request.failure, _MISSED if request.missed else _FAILED)
                )
                del self._requests[span.request_id]
        return answers

    def _score(
        self, hidden: torch.Tensor, work: Sequence[tuple[_Request, ScoreJob, slice]]
    ) -> None:
        """Score all parts together or, if that fails, one by one, so that only a bad one fails."""
        if not work:
            return
        states = torch.cat([hidden[where] for _, _, where in work])
        try:
            jobs = [job for _, job, _ in work]
            scored = score_positions(states, self._head, jobs, self._vocab_size, self._chunk_bytes)
        except Exception as error:  # no error of one sequence may end the engine
            if len(work) > 1:
                for item in work:
                    self._score(hidden, [item])
            else:
                work[0][0].failure = str(error) or type(error).__name__
            return
        for (request, _, _), scores in zip(work, scored, strict=True):
            request.parts.append(scores)


def _part_of(job: ScoreJob, first: int, count: int) -> ScoreJob:
    """Return the job of ``count`` of a job's positions, from number ``first`` on."""
    start = job.completion_start + first
    requested = job.requested_token_ids
    return ScoreJob(
        token_ids=job.token_ids[: start + count],
        completion_start=start,
        top_k=job.top_k,
        temperature=job.temperature,
        requested_token_ids=None if requested is None else requested[first : first + count],
        logprob_dtype=job.logprob_dtype,
        draw_key=job.draw_key,
    )


class Float32Head:
    """The output layer of a vLLM model with logits in float32, where the layer can give them.

    vLLM has this as ``head_dtype`` of its logits processors. It is set during the calls made here
    only, so the engine samples from logits as configured. A quantised output layer answers in the
    model's own dtype.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        modules: Iterable[Any] = getattr(model, "modules", tuple)()
        self._processors = [one for one in modules if hasattr(one, "head_dtype")]
        if not self._processors:
            logger.warning("Scores come from logits of the model's own dtype: no head_dtype here")

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return logits [n, V] of hidden states [n, d], on every tensor-parallel rank."""
        given = [one.head_dtype for one in self._processors]
        try:
            for one in self._processors:
                one.head_dtype = torch.float32
            return self._logits(hidden)
        except ValueError as error:  # raised before ranks exchange anything
            logger.warning("Scores come from logits of the model's own dtype: %s", error)
        finally:
            for one, dtype in zip(self._processors, given, strict=True):
                one.head_dtype = dtype
        self._processors = []
        return self._logits(hidden)

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self._model.compute_logits(hidden)
        return logits


class ScoringExtension(SeededSampling):
    """A worker extension (``--worker-extension-cls``), called by ``collective_rpc``."""

    def install_scoring(self, vocab_size: int, chunk_bytes: int = CHUNK_BYTES) -> str:
        """Hook the model runner and return its version, ``V1`` or ``V2``.

        Args:
            vocab_size: size of the output layer.
            chunk_bytes: of float32 logits made at once.

        Raises:
            RuntimeError: this vLLM's runner is not built as the hooks expect.
        """
        runner: Any = self.model_runner  # type: ignore[attr-defined]
        scorer = StepScorer(Float32Head(runner.model), vocab_size, chunk_bytes)
        if is_first_runner(runner):
            _hook_v1(runner, scorer)
            return "V1"
        if hasattr(runner, "prompt_logprobs_worker"):
            if runner.prompt_logprobs_worker is not None:  # only the last pipeline rank has one
                _hook_v2(runner.prompt_logprobs_worker, scorer)
            return "V2"
        raise RuntimeError(f"unknown model runner {type(runner).__name__}")


def _hook_v1(runner: Any, scorer: StepScorer) -> None:
    """Hook the runner that keeps its requests in ``requests`` and scores after sampling."""
    original = prompt_logprobs_method(runner)
    sample_tokens = runner.sample_tokens
    seen: set[str] = set()
    answers: dict[str, torch.Tensor] = {}

    def get_prompt_logprobs_dict(hidden_states: torch.Tensor, num_scheduled_tokens: Any) -> Any:
        for request_id in seen - runner.requests.keys():
            scorer.drop(request_id)
            seen.discard(request_id)
        spans = []
        for request_id, count in num_scheduled_tokens.items():
            request = runner.requests[request_id]
            if request_id not in seen:
                seen.add(request_id)
                scorer.add(request_id, request.sampling_params)
            if request_id in scorer:
                index = runner.input_batch.req_id_to_index[request_id]
                offset = int(runner.query_start_loc.np[index])
                spans.append(Span(request_id, offset, request.num_computed_tokens, count))
        answers.update(scorer.score(hidden_states, spans))
        return original(hidden_states, num_scheduled_tokens)

    def sample(*arguments: Any, **options: Any) -> Any:
        output = sample_tokens(*arguments, **options)
        if answers:
            # Async scheduling wraps the output until its copies from the device are done.
            runner_output(output).prompt_token_id_logprobs_dict = dict(answers)
            answers.clear()
        return output

    replace_prompt_logprobs_method(runner, get_prompt_logprobs_dict)
    runner.sample_tokens = sample


def _hook_v2(worker: Any, scorer: StepScorer) -> None:
    """Hook the runner whose prompt log-prob worker is told of requests and of every step."""
    compute = checked_method(
        worker, "compute_prompt_token_id_logprobs",
        "logits_fn", "hidden_states", "input_batch", "prompt_lens",
    )  # fmt: skip
    add_request = checked_method(worker, "add_request", "req_id", "req_idx", "sampling_params")
    remove_request = checked_method(worker, "remove_request", "req_id")

    def add(req_id: str, req_idx: int, sampling_params: Any) -> None:
        scorer.add(req_id, sampling_params)
        add_request(req_id, req_idx, sampling_params)

    def remove(req_id: str) -> None:
        scorer.drop(req_id)
        remove_request(req_id)

    def compute_scores(
        logits_fn: Any, hidden_states: torch.Tensor, input_batch: Any, prompt_lens: Any
    ) -> dict[str, torch.Tensor]:
        answers = compute(logits_fn, hidden_states, input_batch, prompt_lens)
        spans = [
            Span(
                req_id,
                int(input_batch.query_start_loc_np[i]),
                int(input_batch.num_computed_prefill_tokens_np[i]),
                int(input_batch.num_scheduled_tokens[i]),
            )
            for i, req_id in enumerate(input_batch.req_ids)
            if req_id in scorer
        ]
        return {**answers, **scorer.score(hidden_states, spans)}

    worker.add_request = add
    worker.remove_request = remove
    worker.compute_prompt_token_id_logprobs = compute_scores

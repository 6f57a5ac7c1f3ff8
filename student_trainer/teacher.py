"""The only HTTP of the trainer: completions -> sparse teacher distributions."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import httpx
import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel
from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception,
    stop_after_delay,
    wait_random_exponential,
)

from shared import wire
from shared.errors import (
    OverloadedError,
    PayloadTooLargeError,
    ProtocolError,
    SparseGKDError,
    TeacherAnswerError,
    TeacherChangedError,
    TeacherUnreachableError,
    UnavailableError,
    error_from_problem,
)
from shared.protocol import (
    PROTOCOL_VERSION,
    Completion,
    GenerateRequest,
    GenerateResponse,
    InfoResponse,
    ScoreRequest,
    ScoreResponse,
    ScoreSequence,
    TeacherIdentity,
)
from shared.sparse import SparseLogprobs

logger = logging.getLogger(__name__)

M = TypeVar("M", bound=BaseModel)
R = TypeVar("R")

_MAX_ANSWER_BYTES = 1 << 30
_CONNECTIONS = 8


class TeacherClient:
    """One teacher behind one or several addresses.

    A request goes to the replica with the fewest tokens outstanding; what fails in passing is
    retried with exponential back-off and full jitter until ``timeout``, elsewhere if there is an
    elsewhere. Safe to use from several threads.

    Args:
        urls: addresses of replicas of one teacher, such as ``http://host:8000``.
        timeout: seconds to wait for a teacher: at `connect`, and for each request with retries.
        accept_change: go on when the teacher's identity changes in the middle of a run.
    """

    def __init__(
        self, urls: Sequence[str], *, timeout: float = 600.0, accept_change: bool = False
    ) -> None:
        self.urls = [url.rstrip("/") for url in urls]
        self.timeout = timeout
        self.accept_change = accept_change
        self._bytes_received = 0
        self._tokens_scored = 0
        self._closed = False
        self._info: InfoResponse | None = None
        self._outstanding = dict.fromkeys(self.urls, 0)
        self._lock = threading.Lock()
        self._http = httpx.Client(timeout=httpx.Timeout(timeout, connect=min(timeout, 10.0)))
        self._threads = ThreadPoolExecutor(_CONNECTIONS, thread_name_prefix="teacher")

    def __enter__(self) -> TeacherClient:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Drop what is in flight."""
        self._closed = True
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._http.close()

    @property
    def info(self) -> InfoResponse:
        """What the teacher said of itself at `connect`."""
        if self._info is None:
            raise RuntimeError("call connect() first")
        return self._info

    def take_traffic(self) -> tuple[int, int]:
        """(bytes received, completion tokens scored) since the last call."""
        with self._lock:
            taken = self._bytes_received, self._tokens_scored
            self._bytes_received = self._tokens_scored = 0
        return taken

    def connect(self) -> InfoResponse:
        """Wait until every replica is ready, and read what the teacher is.

        Raises:
            TeacherUnreachableError: one is not ready within ``timeout`` seconds.
            TeacherChangedError: replicas are not one and the same teacher.
            TeacherAnswerError: it speaks another version of the protocol.
        """
        deadline = time.monotonic() + self.timeout
        for url in self.urls:
            self._wait_until_ready(url, deadline)
            info = self._get_info(url)
            if self._info is None:
                self._info = info
            elif info.teacher != self._info.teacher:
                raise TeacherChangedError(
                    f"the replicas are different teachers: {self.urls[0]} is {self._info.teacher}, "
                    f"{url} is {info.teacher}. Serve one model, or give one --teacher_url"
                )
        return self.info

    def submit_score(
        self,
        sequences: Sequence[tuple[NDArray[np.uint32], int]],
        *,
        top_k: int,
        temperature: float = 1.0,
    ) -> Future[list[SparseLogprobs]]:
        """`score` in the background."""
        return self._threads.submit(self.score, sequences, top_k=top_k, temperature=temperature)

    def score(
        self,
        sequences: Sequence[tuple[NDArray[np.uint32], int]],
        *,
        top_k: int,
        temperature: float = 1.0,
    ) -> list[SparseLogprobs]:
        """Teacher distributions of every completion row, in the order given.

        Args:
            sequences: (token_ids [L], completion_start) pairs.
            top_k: log-probs for each row.
            temperature: at which the teacher's logits are normalised.

        Raises:
            InvalidRequestError: the teacher cannot score this; names the field and the limit.
            TeacherUnreachableError: no answer within ``timeout`` seconds.
            TeacherAnswerError: an answer of the wrong shape, or a non-finite log-prob.
            TeacherChangedError: another teacher answered.
        """
        limits = self.info.limits
        costs = [(len(ids), (len(ids) - start) * top_k) for ids, start in sequences]
        answers: list[SparseLogprobs] = []
        for first, last in _split(
            costs, limits.max_sequences, limits.max_tokens, limits.max_logprobs
        ):
            part = sequences[first:last]
            request = ScoreRequest(
                sequences=[
                    ScoreSequence(token_ids=ids, completion_start=start) for ids, start in part
                ],
                top_k=top_k,
                temperature=temperature,
            )
            tokens = sum(len(ids) for ids, _ in part)
            answer = self._post("/v1/score", request, ScoreResponse, tokens)
            self._check_scores(answer.sequences, part, top_k, offset=first)
            answers += answer.sequences
        return answers

    def submit_generate(
        self, prompts: Sequence[NDArray[np.uint32]], **options: object
    ) -> Future[list[Completion]]:
        """`generate` in the background."""
        return self._threads.submit(self.generate, prompts, **options)  # type: ignore[arg-type]

    def generate(
        self,
        prompts: Sequence[NDArray[np.uint32]],
        *,
        max_new_tokens: int,
        temperature: float,
        seed: int,
        stop_token_ids: Sequence[int],
        top_k: int | None = None,
        score_temperature: float = 1.0,
    ) -> list[Completion]:
        """One completion of each prompt [P], with its scores when ``top_k`` is given.

        Raises: as `score`.
        """
        limits = self.info.limits
        costs = [(len(ids) + max_new_tokens, max_new_tokens * (top_k or 0)) for ids in prompts]
        completions: list[Completion] = []
        for first, last in _split(
            costs, limits.max_sequences, limits.max_tokens, limits.max_logprobs
        ):
            request = GenerateRequest(
                prompts=list(prompts[first:last]),
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                seed=seed,
                stop_token_ids=np.asarray(stop_token_ids, dtype=np.uint32),
                top_k=top_k,
                score_temperature=score_temperature,
            )
            tokens = sum(cost for cost, _ in costs[first:last])
            answer = self._post("/v1/generate", request, GenerateResponse, tokens)
            if [len(group) for group in answer.completions] != [1] * (last - first):
                raise TeacherAnswerError(
                    f"{last - first} completions were asked for, the teacher answered "
                    f"{[len(group) for group in answer.completions]}"
                )
            part = [group[0] for group in answer.completions]
            if top_k is not None:
                self._check_scores(
                    [_required_scores(c) for c in part],
                    [
                        (np.append(p, c.token_ids), len(p))
                        for p, c in zip(prompts[first:last], part, strict=True)
                    ],
                    top_k,
                    offset=first,
                )
            completions += part
        return completions

    def _check_scores(
        self,
        scores: Sequence[SparseLogprobs],
        sequences: Sequence[tuple[NDArray[np.uint32], int]],
        top_k: int,
        *,
        offset: int,
    ) -> None:
        if len(scores) != len(sequences):
            raise TeacherAnswerError(
                f"{len(sequences)} sequences were sent, the teacher answered {len(scores)}"
            )
        for index, (score, (ids, start)) in enumerate(zip(scores, sequences, strict=True)):
            expected = (len(ids) - start, top_k)
            if score.token_ids.shape != expected:
                raise TeacherAnswerError(
                    f"sequence {offset + index}: expected top-k arrays of shape {expected}, "
                    f"got {score.token_ids.shape}"
                )
            if score.token_ids.size and int(score.token_ids.max()) >= self.info.vocab_size:
                raise TeacherAnswerError(
                    f"sequence {offset + index}: token id {int(score.token_ids.max())} is outside "
                    f"the teacher's vocabulary of {self.info.vocab_size}"
                )
            score.require_finite(f"sequence {offset + index}")
        with self._lock:
            self._tokens_scored += sum(len(score) for score in scores)

    def _post(self, path: str, request: BaseModel, answer: type[M], tokens: int) -> M:
        body = wire.dump(request, wire.MSGPACK_MEDIA_TYPE)
        return self._retry(lambda url: self._call("POST", url, path, answer, body), tokens)

    def _retry(self, call: Callable[[str], R], tokens: int) -> R:
        retrying = Retrying(
            retry=retry_if_exception(_passes),
            stop=stop_after_delay(self.timeout),
            wait=_wait,
            before_sleep=_log_retry,
            reraise=True,
        )
        try:
            return retrying(self._on_least_loaded, call, tokens)
        except (httpx.TransportError, OverloadedError, UnavailableError) as error:
            raise TeacherUnreachableError(
                f"no answer from {', '.join(self.urls)} within {self.timeout:g} s: {error}. "
                "Check that `teacher-server serve` runs there, or raise --teacher_timeout"
            ) from error

    def _on_least_loaded(self, call: Callable[[str], R], tokens: int) -> R:
        if self._closed:
            raise TeacherUnreachableError("the client is closed")
        with self._lock:
            url = min(self.urls, key=lambda u: self._outstanding[u])
            self._outstanding[url] += tokens
        try:
            return call(url)
        finally:
            with self._lock:
                self._outstanding[url] -= tokens

    def _call(
        self, method: str, url: str, path: str, answer: type[M], body: bytes | None = None
    ) -> M:
        headers = {"Accept": wire.MSGPACK_MEDIA_TYPE}
        if body is not None:
            headers["Content-Type"] = wire.MSGPACK_MEDIA_TYPE
        response = self._http.request(method, url + path, content=body, headers=headers)
        if response.status_code != 200:
            raise _refusal(response)
        try:
            message = wire.load(
                answer, response.content, wire.MSGPACK_MEDIA_TYPE, max_bytes=_MAX_ANSWER_BYTES
            )
        except (ProtocolError, PayloadTooLargeError) as error:
            raise TeacherAnswerError(f"{url}{path} answered something else: {error}") from error
        with self._lock:
            self._bytes_received += len(response.content)
        if isinstance(message, (ScoreResponse, GenerateResponse)):
            self._check_identity(url, message.teacher)
        return message

    def _check_identity(self, url: str, identity: TeacherIdentity) -> None:
        if identity == self.info.teacher:
            return
        message = f"{url} is another teacher now: it was {self.info.teacher}, it is {identity}"
        if not self.accept_change:
            raise TeacherChangedError(
                f"{message}. Bring the first one back, or pass --accept_teacher_change"
            )
        logger.warning(message)
        with self._lock:
            self._info = self.info.model_copy(update={"teacher": identity})

    def _get_info(self, url: str) -> InfoResponse:
        info = self._call("GET", url, "/v1/info", InfoResponse)
        if info.protocol_version != PROTOCOL_VERSION:
            raise TeacherAnswerError(
                f"{url} speaks protocol version {info.protocol_version}, this trainer "
                f"{PROTOCOL_VERSION}: install the same release of sparse-gkd on both sides"
            )
        return info

    def _wait_until_ready(self, url: str, deadline: float) -> None:
        problem, announced = "", 0.0
        while True:
            try:
                response = self._http.get(f"{url}/ready", timeout=10.0)
                if response.status_code == 200:
                    return
                problem = f"answers {response.status_code} to /ready"
            except httpx.TransportError as error:
                problem = f"is not reachable ({error})"
            left = deadline - time.monotonic()
            if left <= 0:
                raise TeacherUnreachableError(
                    f"the teacher at {url} {problem} after {self.timeout:g} s. Start it with "
                    "`teacher-server serve MODEL`, check --teacher_url, or raise --teacher_timeout"
                )
            if time.monotonic() - announced >= 5.0:
                announced = time.monotonic()
                logger.warning(
                    "Waiting for the teacher at %s: it %s; %.0f s left", url, problem, left
                )
            time.sleep(min(0.5, left))


def _split(
    costs: Sequence[tuple[int, int]], max_count: int, max_tokens: int, max_logprobs: int
) -> list[tuple[int, int]]:
    """[first, last) ranges whose summed (tokens, log-probs) keep within a request's limits."""
    ranges: list[tuple[int, int]] = []
    first = tokens = logprobs = 0
    for index, (more_tokens, more_logprobs) in enumerate(costs):
        full = (
            index - first >= max_count
            or tokens + more_tokens > max_tokens
            or logprobs + more_logprobs > max_logprobs
        )
        if full and index > first:
            ranges.append((first, index))
            first, tokens, logprobs = index, 0, 0
        tokens += more_tokens
        logprobs += more_logprobs
    if costs:
        ranges.append((first, len(costs)))
    return ranges


def _required_scores(completion: Completion) -> SparseLogprobs:
    if completion.scores is None:
        raise TeacherAnswerError("scores were asked for with the completions, none came")
    return completion.scores


def _refusal(response: httpx.Response) -> SparseGKDError:
    try:
        problem = response.json()
    except ValueError:
        problem = {}
    if not isinstance(problem, dict):
        problem = {}
    try:
        retry_after = float(response.headers.get("Retry-After", ""))
    except ValueError:
        retry_after = None
    if response.status_code >= 500 and not problem:
        return UnavailableError(f"status {response.status_code}", retry_after=retry_after)
    return error_from_problem(response.status_code, problem, retry_after=retry_after)


def _passes(error: BaseException) -> bool:
    """Whether the same request may succeed later."""
    return isinstance(error, (httpx.TransportError, OverloadedError, UnavailableError))


_backoff = wait_random_exponential(multiplier=0.25, max=30.0)


def _wait(state: RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome else None
    asked = error.retry_after if isinstance(error, ProtocolError) else None
    return max(asked or 0.0, _backoff(state))


def _log_retry(state: RetryCallState) -> None:
    error = state.outcome.exception() if state.outcome else None
    pause = state.next_action.sleep if state.next_action else 0.0
    logger.warning("Teacher call failed (%s); next try in %.1f s", error, pause)

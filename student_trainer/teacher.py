"""What the trainer asks of a teacher, and the client of sparse-gkd's own server.

HTTP ends here and in the two modules beside it: `student_trainer.replicas` and
`student_trainer.vllm_teacher`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any, Protocol, Self, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from shared import wire
from shared.errors import (
    PayloadTooLargeError,
    ProtocolError,
    TeacherAnswerError,
    TeacherChangedError,
    TokenizerMismatchError,
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
from student_trainer.replicas import Replicas

logger = logging.getLogger(__name__)

M = TypeVar("M", bound=BaseModel)

Sequences = Sequence[tuple[NDArray[np.uint32], int]]  # (token_ids [L], completion_start) pairs

_MAX_ANSWER_BYTES = 1 << 30
_HEADERS = {"Accept": wire.MSGPACK_MEDIA_TYPE, "Content-Type": wire.MSGPACK_MEDIA_TYPE}


class Teacher(Protocol):
    """A served teacher, whatever it speaks; safe to use from several threads.

    Scores are at the temperature asked for. Errors of every call but `close`:
        InvalidRequestError: the teacher cannot do this; names the field and the limit.
        TeacherUnreachableError: no answer within the timeout.
        TeacherAnswerError: an answer of the wrong shape, or a non-finite log-prob.
        TeacherChangedError: another teacher answered.
    """

    def __enter__(self) -> Self: ...

    def __exit__(self, *exception: object) -> None: ...

    @property
    def info(self) -> InfoResponse:
        """What the teacher said of itself at `connect`."""
        ...

    def connect(self) -> InfoResponse:
        """Wait until every replica is ready, and read what the teacher is."""
        ...

    def take_traffic(self) -> tuple[int, int]:
        """(bytes received, completion tokens scored) since the last call."""
        ...

    def score(
        self,
        sequences: Sequences,
        *,
        top_k: int,
        temperature: float = 1.0,
        requested: Sequence[NDArray[np.uint32]] | None = None,
    ) -> list[SparseLogprobs]:
        """Teacher distributions of every completion row, in the order given.

        Args:
            requested: for each sequence, ids [T, m] that its rows are scored at too.
        """
        ...

    def submit_score(
        self,
        sequences: Sequences,
        *,
        top_k: int,
        temperature: float = 1.0,
        requested: Sequence[NDArray[np.uint32]] | None = None,
    ) -> Future[list[SparseLogprobs]]:
        """`score` in the background."""
        ...

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
        """One completion of each prompt [P], with its scores when ``top_k`` is given."""
        ...

    def submit_generate(
        self,
        prompts: Sequence[NDArray[np.uint32]],
        *,
        max_new_tokens: int,
        temperature: float,
        seed: int,
        stop_token_ids: Sequence[int],
        top_k: int | None = None,
        score_temperature: float = 1.0,
    ) -> Future[list[Completion]]:
        """`generate` in the background."""
        ...


class TeacherClient:
    """`Teacher` that speaks the protocol of `shared.protocol`: one behind one or several addresses.

    Args:
        urls: addresses of replicas of one teacher, such as ``http://host:8000``.
        timeout: seconds to wait for a teacher: at `connect`, and for each request with retries.
        accept_change: go on when the teacher's identity changes in the middle of a run.
    """

    def __init__(
        self, urls: Sequence[str], *, timeout: float = 600.0, accept_change: bool = False
    ) -> None:
        self.accept_change = accept_change
        self._info: InfoResponse | None = None
        self._lock = threading.Lock()
        self._replicas = Replicas(
            urls,
            timeout=timeout,
            ready="/ready",
            rejoins=self._rejoins,
            start="teacher-server serve MODEL",
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Drop what is in flight."""
        self._replicas.close()

    @property
    def info(self) -> InfoResponse:
        """What the teacher said of itself at `connect`."""
        if self._info is None:
            raise RuntimeError("call connect() first")
        return self._info

    def take_traffic(self) -> tuple[int, int]:
        """(bytes received, completion tokens scored) since the last call."""
        return self._replicas.take_traffic()

    def connect(self) -> InfoResponse:
        """Wait until every replica is ready, and read what the teacher is.

        Raises:
            TeacherUnreachableError: one is not ready within ``timeout`` seconds.
            TeacherChangedError: replicas are not one and the same teacher.
            TeacherAnswerError: it speaks another version of the protocol.
        """
        self._replicas.wait_until_ready()
        urls = self._replicas.urls
        for url in urls:
            info = self._replicas.ask(url, self._get_info)
            if self._info is None:
                self._info = info
            elif info.teacher != self._info.teacher:
                raise TeacherChangedError(
                    f"the replicas are different teachers: {urls[0]} is {self._info.teacher}, "
                    f"{url} is {info.teacher}. Serve one model, or give one --teacher_url"
                )
        return self.info

    def submit_score(
        self,
        sequences: Sequences,
        *,
        top_k: int,
        temperature: float = 1.0,
        requested: Sequence[NDArray[np.uint32]] | None = None,
    ) -> Future[list[SparseLogprobs]]:
        """`score` in the background."""
        return self._replicas.submit(
            self.score, sequences, top_k=top_k, temperature=temperature, requested=requested
        )

    def score(
        self,
        sequences: Sequences,
        *,
        top_k: int,
        temperature: float = 1.0,
        requested: Sequence[NDArray[np.uint32]] | None = None,
    ) -> list[SparseLogprobs]:
        """Teacher distributions of every completion row, in the order given.

        Args:
            sequences: (token_ids [L], completion_start) pairs.
            top_k: log-probs for each row.
            temperature: at which the teacher's logits are normalised.
            requested: for each sequence, further ids [T, m] to score in each of its rows.

        Raises:
            InvalidRequestError: the teacher cannot score this; names the field and the limit.
            TeacherUnreachableError: no answer within ``timeout`` seconds.
            TeacherAnswerError: an answer of the wrong shape, or a non-finite log-prob.
            TeacherChangedError: another teacher answered.
        """
        limits = self.info.limits
        asked = [None] * len(sequences) if requested is None else list(requested)
        costs = [
            (len(ids), (len(ids) - start) * (top_k + _width(more)))
            for (ids, start), more in zip(sequences, asked, strict=True)
        ]
        answers: list[SparseLogprobs] = []
        for first, last in split(
            costs, limits.max_sequences, limits.max_tokens, limits.max_logprobs
        ):
            part, wanted = sequences[first:last], asked[first:last]
            request = ScoreRequest(
                sequences=[
                    ScoreSequence(token_ids=ids, completion_start=start, requested_token_ids=more)
                    for (ids, start), more in zip(part, wanted, strict=True)
                ],
                top_k=top_k,
                temperature=temperature,
            )
            tokens = sum(len(ids) for ids, _ in part)
            answer = self._post("/v1/score", request, ScoreResponse, tokens)
            widths = [_width(more) for more in wanted]
            self._count(answer.sequences, part, top_k, widths, offset=first)
            answers += answer.sequences
        return answers

    def submit_generate(
        self, prompts: Sequence[NDArray[np.uint32]], **options: Any
    ) -> Future[list[Completion]]:
        """`generate` in the background."""
        return self._replicas.submit(self.generate, prompts, **options)

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
        for first, last in split(
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
                self._count(
                    [_required_scores(c) for c in part],
                    [
                        (np.append(p, c.token_ids), len(p))
                        for p, c in zip(prompts[first:last], part, strict=True)
                    ],
                    top_k,
                    [0] * len(part),
                    offset=first,
                )
            completions += part
        return completions

    def _count(
        self,
        scores: Sequence[SparseLogprobs],
        sequences: Sequences,
        top_k: int,
        requested: Sequence[int],
        *,
        offset: int,
    ) -> None:
        rows = check_scores(
            scores,
            sequences,
            top_k=top_k,
            vocab_size=self.info.vocab_size,
            requested=requested,
            offset=offset,
        )
        self._replicas.count_scored(rows)

    def _post(self, path: str, request: BaseModel, answer: type[M], tokens: int) -> M:
        body = wire.dump(request, wire.MSGPACK_MEDIA_TYPE)
        return self._replicas.call(lambda url: self._call("POST", url, path, answer, body), tokens)

    def _call(
        self, method: str, url: str, path: str, answer: type[M], body: bytes | None = None
    ) -> M:
        content = self._replicas.request(url, method, path, headers=_HEADERS, body=body)
        try:
            message = wire.load(
                answer, content, wire.MSGPACK_MEDIA_TYPE, max_bytes=_MAX_ANSWER_BYTES
            )
        except (ProtocolError, PayloadTooLargeError) as error:
            raise TeacherAnswerError(f"{url}{path} answered something else: {error}") from error
        if isinstance(message, (ScoreResponse, GenerateResponse)):
            self._check_identity(url, message.teacher)
        return message

    def _check_identity(self, url: str, identity: TeacherIdentity) -> None:
        if identity == self.info.teacher:
            return
        error = self._changed(url, identity)
        if not self.accept_change:
            raise error
        info, known = self._get_info(url), self.info
        same = (info.tokenizer.fingerprint, info.vocab_size)
        if same != (known.tokenizer.fingerprint, known.vocab_size):
            raise TokenizerMismatchError(
                f"{error} It has another vocabulary too: {info.vocab_size} rows and tokenizer "
                f"{info.tokenizer.fingerprint}, not {known.vocab_size} and "
                f"{known.tokenizer.fingerprint}"
            )
        logger.warning("%s", error)
        with self._lock:
            self._info = info

    def _changed(self, url: str, identity: TeacherIdentity) -> TeacherChangedError:
        return TeacherChangedError(
            f"{url} is another teacher now: it was {self.info.teacher}, it is {identity}. "
            "Bring the first one back, or pass --accept_teacher_change"
        )

    def _rejoins(self, url: str) -> bool:
        """Whether a replica that is back is the teacher that the others are.

        Another one is accepted, when told so, only once no replica of the first is left: two
        teachers never answer side by side.
        """
        identity = self._get_info(url).teacher
        if identity != self.info.teacher and not self.accept_change:
            raise self._changed(url, identity)
        return identity == self.info.teacher

    def _get_info(self, url: str) -> InfoResponse:
        info = self._call("GET", url, "/v1/info", InfoResponse)
        if info.protocol_version != PROTOCOL_VERSION:
            raise TeacherAnswerError(
                f"{url} speaks protocol version {info.protocol_version}, this trainer "
                f"{PROTOCOL_VERSION}: install the same release of sparse-gkd on both sides"
            )
        return info


def check_scores(
    scores: Sequence[SparseLogprobs],
    sequences: Sequences,
    *,
    top_k: int,
    vocab_size: int,
    requested: Sequence[int] | None = None,
    offset: int = 0,
) -> int:
    """Number of rows of an answer, after a check that it fits what was asked.

    Args:
        scores: the answer.
        sequences: what was sent.
        top_k: log-probs asked for.
        vocab_size: of the teacher.
        requested: number m of requested ids of each sequence; None for none.
        offset: number of the first sequence, for messages.

    Raises:
        TeacherAnswerError: wrong count or shape, a token id outside, a non-finite log-prob.
    """
    if len(scores) != len(sequences):
        raise TeacherAnswerError(
            f"{len(sequences)} sequences were sent, the teacher answered {len(scores)}"
        )
    widths = [0] * len(scores) if requested is None else requested
    triples = zip(scores, sequences, widths, strict=True)
    for index, (score, (ids, start), width) in enumerate(triples):
        expected = (len(ids) - start, top_k)
        if score.token_ids.shape != expected:
            raise TeacherAnswerError(
                f"sequence {offset + index}: expected top-k arrays of shape {expected}, "
                f"got {score.token_ids.shape}"
            )
        found = score.requested_logprobs
        if (found.shape if found is not None else (expected[0], 0)) != (expected[0], width):
            raise TeacherAnswerError(
                f"sequence {offset + index}: expected log-probs of {width} requested ids in "
                f"{expected[0]} rows, got {'none' if found is None else found.shape}"
            )
        if score.token_ids.size and int(score.token_ids.max()) >= vocab_size:
            raise TeacherAnswerError(
                f"sequence {offset + index}: token id {int(score.token_ids.max())} is outside "
                f"the teacher's vocabulary of {vocab_size}"
            )
        score.require_finite(f"sequence {offset + index}")
    return sum(len(score) for score in scores)


def split(
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


def _width(requested: NDArray[np.uint32] | None) -> int:
    return 0 if requested is None else requested.shape[1]


def _required_scores(completion: Completion) -> SparseLogprobs:
    if completion.scores is None:
        raise TeacherAnswerError("scores were asked for with the completions, none came")
    return completion.scores

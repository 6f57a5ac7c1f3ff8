"""What the trainer asks of a teacher, and the client of sparse-gkd's own server.

HTTP ends here and in the two modules beside it: `student_trainer.replicas` and
`student_trainer.vllm_teacher`.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import ParamSpec, Protocol, Self, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from shared import codec, wire
from shared.errors import (
    InvalidRequestError,
    MalformedRequestError,
    PayloadTooLargeError,
    TeacherAnswerError,
    TeacherChangedError,
    TokenizerMismatchError,
    error_from_problem,
)
from shared.printable import one_line
from shared.protocol import (
    PROTOCOL_VERSION,
    Completion,
    GenerateEnd,
    GenerateEvent,
    GenerateRequest,
    InfoResponse,
    Limits,
    LogprobDtype,
    ScoreRequest,
    ScoreResponse,
    ScoreSequence,
    TeacherIdentity,
)
from shared.sparse import SparseLogprobs
from student_trainer.parts import in_parts
from student_trainer.replicas import FAILURES, Replicas, Unreachable

logger = logging.getLogger(__name__)

M = TypeVar("M", bound=BaseModel)
P = ParamSpec("P")
R = TypeVar("R")

Sequences = Sequence[tuple[NDArray[np.uint32], int]]  # (token_ids [L], completion_start) pairs

_LONGEST_NAME = 1_000  # characters
_MAX_ANSWER_BYTES = 1 << 30
_MAX_BYTES_BESIDE_ARRAYS = 1 << 16  # of an answer; and once more of each sequence in it


@dataclass(frozen=True)
class Sampling:
    """How a teacher writes completions.

    Attributes:
        max_new_tokens: of each completion, at most.
        temperature: of the sampling; 0 is greedy.
        seed: a completion is a function of it and of the prompt.
        stop_token_ids: each ends a completion, as its last token.
        top_k: the completions are scored too, with so many log-probs for each row; None: not.
        score_temperature: at which the logits of these scores are normalised.
    """

    max_new_tokens: int
    temperature: float
    seed: int
    stop_token_ids: Sequence[int]
    top_k: int | None = None
    score_temperature: float = 1.0


def sequence_of(
    prompt: NDArray[np.uint32], completion: Completion
) -> tuple[NDArray[np.uint32], int]:
    """(token_ids [L], completion_start), as `Teacher.score` takes them."""
    return np.append(prompt, completion.token_ids).astype(np.uint32), len(prompt)


def with_scores(
    completions: Sequence[Completion], scores: Sequence[SparseLogprobs]
) -> list[Completion]:
    """The completions, each with its own scores."""
    return [
        completion.model_copy(update={"scores": score})
        for completion, score in zip(completions, scores, strict=True)
    ]


def check_info(where: str, info: InfoResponse) -> None:
    """Check what a teacher says of itself, before anything rests on it.

    Raises:
        TeacherAnswerError: an end token outside its vocabulary, or a name that would write over a
            terminal or break a line of a log.
    """
    outside = [i for i in info.eos_token_ids if not 0 <= i < info.vocab_size]
    if outside:
        raise TeacherAnswerError(
            f"{where}: eos_token_ids names {outside[0]}, which is outside the teacher's vocabulary "
            f"of {info.vocab_size}. Check eos_token_id in its generation_config.json"
        )
    names = {
        **info.teacher.model_dump(),
        "tokenizer": info.tokenizer.fingerprint,
        "tokenizer's encoding": info.tokenizer.encoding or "",
    }
    for field, value in names.items():
        if len(value) > _LONGEST_NAME or not value.isprintable():
            raise TeacherAnswerError(
                f"{where}: the teacher's {field} is {one_line(value, 100)}; expected were at most "
                f"{_LONGEST_NAME} characters, none of them a control character"
            )


def check_scores(
    name: str,
    score: SparseLogprobs,
    sequence: tuple[NDArray[np.uint32], int],
    *,
    top_k: int,
    width: int = 0,
    vocab_size: int,
    drawn: bool = False,
) -> None:
    """Check that scores fit one sequence, wherever they come from.

    Args:
        name: how the message calls the sequence.
        sequence: (token_ids [L], completion_start).
        top_k: log-probs asked for in each of T rows, T = L − completion_start.
        width: requested ids of each row.
        vocab_size: the teacher's.
        drawn: the support is drawn from the teacher.

    Raises:
        TeacherAnswerError: a wrong shape, a token id outside, a non-finite log-prob, or what cannot
            be the distributions of this sequence.
    """
    ids, start = sequence
    expected = (len(ids) - start, top_k)
    if score.token_ids.shape != expected:
        raise TeacherAnswerError(
            f"{name}: expected top-k arrays of shape {expected}, got {score.token_ids.shape}"
        )
    found = score.requested_logprobs
    if (found.shape if found is not None else (expected[0], 0)) != (expected[0], width):
        raise TeacherAnswerError(
            f"{name}: expected log-probs of {width} requested ids in "
            f"{expected[0]} rows, got {'none' if found is None else found.shape}"
        )
    if score.token_ids.size and int(score.token_ids.max()) >= vocab_size:
        raise TeacherAnswerError(
            f"{name}: token id {int(score.token_ids.max())} is outside "
            f"the teacher's vocabulary of {vocab_size}"
        )
    score.require_finite(name)
    score.require_plausible(name, ids[start:], drawn=drawn)


def check_completion(name: str, completion: Completion, *, longest: int, vocab_size: int) -> None:
    """Check the tokens of a completion, wherever it comes from.

    Args:
        name: how the message calls it.
        longest: tokens asked for at most.
        vocab_size: the teacher's.

    Raises:
        TeacherAnswerError: no token, too many, or one outside the vocabulary.
    """
    ids = completion.token_ids
    if not 1 <= len(ids) <= longest or int(ids.max()) >= vocab_size:
        raise TeacherAnswerError(
            f"{name} has {len(ids)} tokens and ids up to {ids.max(initial=0)}; asked for were 1 to "
            f"{longest} of a vocabulary of {vocab_size}"
        )


class Teacher(Protocol):
    """A served teacher, whatever it speaks; safe to use from several threads.

    Scores are at the temperature asked for. Errors of every call but `close`:
        InvalidRequestError: the teacher cannot do this; names the field and the limit.
        PayloadTooLargeError, DeadlineExceededError: one sequence alone is too much; names it.
        TeacherUnreachableError: no answer within the timeout.
        TeacherUnauthorizedError: the teacher wants a key, or another one.
        TeacherAnswerError: an answer of the wrong shape, or a non-finite log-prob.
        TeacherChangedError: another teacher answered.
    """

    _replicas: Replicas
    _info: InfoResponse | None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Drop what is in flight."""
        self._replicas.close()

    @property
    def info(self) -> InfoResponse:
        """What is known of the teacher since `connect`."""
        if self._info is None:
            raise RuntimeError("call connect() first")
        return self._info

    @property
    def connected(self) -> bool:
        """Whether the teacher itself was met, and not only a cache that knows it."""
        return self._info is not None

    def take_traffic(self) -> tuple[int, int]:
        """(bytes received, completion tokens scored) since the last call."""
        return self._replicas.take_traffic()

    @property
    def live(self) -> Teacher:
        """The teacher for what is asked once and never again: past a cache, if there is one."""
        return self

    def take_lookups(self) -> tuple[int, int, int]:
        """(answers looked up in a cache, found there, found corrupt) since the last call."""
        return 0, 0, 0

    def connect(self) -> InfoResponse:
        """Wait until every replica is ready, and read what the teacher is.

        Raises:
            TeacherUnreachableError: one is not ready within the timeout.
            TeacherChangedError: replicas are not one and the same teacher.
            TeacherAnswerError: something else listens there.
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

    def _get_info(self, url: str) -> InfoResponse:
        """What one replica says of itself."""
        ...

    def _check(
        self,
        scores: Sequence[SparseLogprobs],
        sequences: Sequences,
        top_k: int,
        requested: Sequence[int] | None = None,
        *,
        url: str,
        offset: int,
        drawn: bool = False,
    ) -> None:
        """Check that scores fit what was asked, and count their rows.

        Args:
            requested: number m of requested ids of each sequence; None for none.
            url: of the replica that answered, for messages.
            offset: number of the first sequence, for messages.
            drawn: the supports are draws from the teacher.

        Raises:
            TeacherAnswerError: wrong count or shape, a token id outside, a non-finite log-prob, or
                what cannot be the distributions of these sequences.
        """
        if len(scores) != len(sequences):
            raise TeacherAnswerError(
                f"{len(sequences)} sequences were sent, {url} answered {len(scores)}"
            )
        widths = [0] * len(scores) if requested is None else requested
        triples = zip(scores, sequences, widths, strict=True)
        for number, (score, (ids, start), width) in enumerate(triples, offset):
            check_scores(
                f"{url}, sequence {number}",
                score,
                (ids, start),
                top_k=top_k,
                width=width,
                vocab_size=self.info.vocab_size,
                drawn=drawn,
            )
        self._replicas.count_scored(sum(len(score) for score in scores))

    def score(
        self,
        sequences: Sequences,
        *,
        top_k: int,
        temperature: float = 1.0,
        requested: Sequence[NDArray[np.uint32]] | None = None,
        sample_seed: int | None = None,
    ) -> list[SparseLogprobs]:
        """Teacher distributions of every completion row, in the order given.

        Args:
            top_k: log-probs for each row.
            temperature: at which the teacher's logits are normalised.
            requested: for each sequence, ids [T, m] that its rows are scored at too.
            sample_seed: the ids are ``top_k`` draws, as in `shared.protocol.ScoreRequest`.
        """
        ...

    def generate(
        self, prompts: Sequence[NDArray[np.uint32]], sampling: Sampling
    ) -> list[Completion]:
        """One completion of each prompt [P], with its scores where ``sampling`` asks for them."""
        ...

    def submit(
        self, call: Callable[P, list[R]], *arguments: P.args, **options: P.kwargs
    ) -> Future[list[R]]:
        """``call``, which is this teacher's `score` or `generate`, in the background."""
        return self._replicas.submit(call, *arguments, **options)


class SparseGkdTeacher(Teacher):
    """`Teacher` that speaks the protocol of `shared.protocol`.

    Args:
        urls: addresses of replicas of one teacher, such as ``http://host:8000``.
        timeout: seconds to wait for a teacher: at `connect`, and for each request with retries.
        accept_change: go on when the teacher's identity changes in the middle of a run.
        logprob_dtype: of log-probs on the wire; next token and tail are float32 always.
        api_key: the teacher's, sent as ``Authorization: Bearer``.
        unreachable: as in `Replicas`.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        timeout: float = 600.0,
        accept_change: bool = False,
        logprob_dtype: LogprobDtype = "float32",
        api_key: str | None = None,
        unreachable: Unreachable = "wait",
    ) -> None:
        self.accept_change = accept_change
        self.logprob_dtype = logprob_dtype
        self._info = None
        self._lock = threading.Lock()
        self._replicas = Replicas(
            urls,
            timeout=timeout,
            media_type=wire.MSGPACK_MEDIA_TYPE,
            ready="/ready",
            rejoins=self._rejoins,
            start="teacher-server serve MODEL",
            api_key=api_key,
            unreachable=unreachable,
        )

    def score(
        self,
        sequences: Sequences,
        *,
        top_k: int,
        temperature: float = 1.0,
        requested: Sequence[NDArray[np.uint32]] | None = None,
        sample_seed: int | None = None,
    ) -> list[SparseLogprobs]:
        asked = [None] * len(sequences) if requested is None else list(requested)
        items = [
            ScoreSequence(token_ids=ids, completion_start=start, requested_token_ids=more)
            for (ids, start), more in zip(sequences, asked, strict=True)
        ]
        widths = [requested_width(more) for more in asked]
        envelope = ScoreRequest(
            sequences=[],
            top_k=top_k,
            temperature=temperature,
            logprob_dtype=self.logprob_dtype,
            sample_seed=sample_seed,
        )
        costs = [
            (1, len(ids), (len(ids) - start) * (top_k + width), _size(item))
            for (ids, start), width, item in zip(sequences, widths, items, strict=True)
        ]

        def ask(first: int, last: int) -> list[SparseLogprobs]:
            request = envelope.model_copy(update={"sequences": items[first:last]})
            tokens = sum(len(ids) for ids, _ in sequences[first:last])
            body = wire.dump(request, wire.MSGPACK_MEDIA_TYPE)
            most = _MAX_BYTES_BESIDE_ARRAYS + sum(map(_answer_bytes, costs[first:last]))

            def scored(url: str) -> list[SparseLogprobs]:
                answer = self._call("POST", url, "/v1/score", ScoreResponse, body, most=most)
                self._check(
                    answer.sequences,
                    sequences[first:last],
                    top_k,
                    widths[first:last],
                    url=url,
                    offset=first,
                    drawn=sample_seed is not None,
                )
                return answer.sequences

            return self._replicas.call(scored, lambda: tokens)

        return in_parts(costs, _room(self.info.limits, envelope), ask)

    def generate(
        self, prompts: Sequence[NDArray[np.uint32]], sampling: Sampling
    ) -> list[Completion]:
        envelope = GenerateRequest(
            prompts=[],
            max_new_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            seed=sampling.seed,
            stop_token_ids=np.asarray(sampling.stop_token_ids, dtype=np.uint32),
            top_k=sampling.top_k,
            score_temperature=sampling.score_temperature,
            logprob_dtype=self.logprob_dtype,
            stream=True,
        )
        rows, top_k = sampling.max_new_tokens, sampling.top_k or 0
        costs = [(1, len(ids) + rows, rows * top_k, len(codec.encode(ids))) for ids in prompts]
        finished: dict[int, Completion] = {}

        def accept(url: str, index: int, completion: Completion) -> None:
            self._check_completion(url, index, prompts[index], completion, sampling)
            finished[index] = completion

        def missing(first: int, last: int) -> list[int]:
            return [index for index in range(first, last) if index not in finished]

        def ask(first: int, last: int) -> list[Completion]:
            # A completion is a function of seed and prompt alone: what a cut connection or a part
            # that was too large has brought already is not asked for again.
            while indices := missing(first, last):
                request = envelope.model_copy(update={"prompts": [prompts[i] for i in indices]})
                body = wire.dump(request, wire.MSGPACK_MEDIA_TYPE)
                receive = partial(self._receive, body=body, indices=indices, accept=accept)
                self._replicas.call(
                    receive, lambda: sum(costs[index][1] for index in missing(first, last))
                )
            return [finished[index] for index in range(first, last)]

        return in_parts(costs, _room(self.info.limits, envelope), ask)

    def _receive(
        self,
        url: str,
        *,
        body: bytes,
        indices: Sequence[int],
        accept: Callable[[str, int, Completion], None],
    ) -> None:
        """Give ``accept`` the completions of one streamed answer: all, or some if it breaks off.

        Args:
            body: a `GenerateRequest` of the prompts whose numbers are ``indices``.

        Raises:
            TeacherAnswerError: not such an answer, or not what was asked for.
            TeacherChangedError: another teacher's; none of its completions was accepted.
            ProtocolError, httpx.TransportError: no completion came; `Replicas.call` tries again.
        """
        path = "/v1/generate"
        waiting = dict(enumerate(indices))  # place in the request -> number of the prompt
        try:
            with self._replicas.stream(url, "POST", path, body) as chunks:
                for message in _messages(url + path, chunks):
                    self._check_identity(url, message.teacher)
                    if isinstance(message, GenerateEnd):
                        if message.problem is not None:
                            problem = message.problem
                            raise error_from_problem(problem.status, problem.model_dump())
                        continue
                    index = waiting.pop(message.prompt, None)
                    if index is None or message.sample != 0:
                        raise TeacherAnswerError(
                            f"{url}{path} answered completion {message.sample} of prompt "
                            f"{message.prompt}, which was not asked for or had come before"
                        )
                    accept(url, index, message.completion)
                    chunks.extend()
        except FAILURES as error:
            if len(waiting) == len(indices):
                raise
            logger.warning(
                "The answer of %s broke off (%s); %d of its %d completions are asked for again",
                url, error, len(waiting), len(indices),
            )  # fmt: skip
        else:
            if waiting:
                raise TeacherAnswerError(
                    f"{len(indices)} completions were asked for, {url} answered "
                    f"{len(indices) - len(waiting)}"
                )

    def _check_completion(
        self,
        url: str,
        index: int,
        prompt: NDArray[np.uint32],
        completion: Completion,
        sampling: Sampling,
    ) -> None:
        check_completion(
            f"{url}: completion {index}",
            completion,
            longest=sampling.max_new_tokens,
            vocab_size=self.info.vocab_size,
        )
        if sampling.top_k is None:
            return
        if completion.scores is None:
            raise TeacherAnswerError(f"{url}: completion {index} came without the scores asked for")
        sequences = [sequence_of(prompt, completion)]
        self._check([completion.scores], sequences, sampling.top_k, url=url, offset=index)

    def _call(
        self,
        method: str,
        url: str,
        path: str,
        answer: type[M],
        body: bytes | None = None,
        *,
        most: int = _MAX_ANSWER_BYTES,
    ) -> M:
        content = self._replicas.request(url, method, path, body, most=most)
        with _readable(url + path):
            message = wire.load(answer, content, wire.MSGPACK_MEDIA_TYPE, max_bytes=most)
        if isinstance(message, ScoreResponse):
            self._check_identity(url, message.teacher)
        return message

    def _check_identity(self, url: str, identity: TeacherIdentity) -> None:
        if identity == self.info.teacher:
            return
        error = self._changed(url, identity)
        if not self.accept_change:
            raise error
        info, known = self._get_info(url), self.info
        same = (info.tokenizer.fingerprint, info.vocab_size, info.tokenizer.encoding)
        if same != (known.tokenizer.fingerprint, known.vocab_size, known.tokenizer.encoding):
            raise TokenizerMismatchError(
                f"{error} It has another tokenizer too: {info.vocab_size} rows, vocabulary "
                f"{info.tokenizer.fingerprint} and encoding {info.tokenizer.encoding}, not "
                f"{known.vocab_size}, {known.tokenizer.fingerprint} and {known.tokenizer.encoding}"
            )
        logger.warning("%s", error)
        with self._lock:
            self._info = info

    def _changed(self, url: str, identity: TeacherIdentity) -> TeacherChangedError:
        return TeacherChangedError(
            f"{url} is another teacher now: it was {self.info.teacher}, it is {identity!s:.500}. "
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
        check_info(url, info)
        return info


def _room(limits: Limits, envelope: BaseModel) -> tuple[int, int, int, int]:
    """Sequences, tokens, log-probs and bytes that fit a request beside its other fields."""
    list_header = 4  # more than that of the envelope's empty list
    body = limits.max_body_bytes - _size(envelope) - list_header
    return limits.max_sequences, limits.max_tokens, limits.max_logprobs, body


def _size(message: BaseModel) -> int:
    """Bytes in a request's body."""
    return len(wire.dump(message, wire.MSGPACK_MEDIA_TYPE))


def _answer_bytes(cost: tuple[int, ...]) -> int:
    """Most bytes in the answer to one sequence: an id and a float32 for each log-prob."""
    _, tokens, logprobs, _ = cost
    return _MAX_BYTES_BESIDE_ARRAYS + 8 * (tokens + logprobs)


def requested_width(requested: NDArray[np.uint32] | None) -> int:
    return 0 if requested is None else requested.shape[1]


def _messages(where: str, chunks: Iterable[bytes]) -> Iterator[GenerateEvent | GenerateEnd]:
    # A generator: what the reader of a message raises does not come by here.
    with _readable(where):
        yield from wire.stream_messages(
            chunks, wire.MSGPACK_STREAM_MEDIA_TYPE, max_bytes=_MAX_ANSWER_BYTES
        )


@contextlib.contextmanager
def _readable(where: str) -> Iterator[None]:
    """What cannot be decoded is a `TeacherAnswerError`."""
    try:
        yield
    except (MalformedRequestError, InvalidRequestError, PayloadTooLargeError) as error:
        text = one_line(str(error))
        raise TeacherAnswerError(f"{where} answered something else: {text}") from error

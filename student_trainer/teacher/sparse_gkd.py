"""The client of sparse-gkd's own server."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import ParamSpec, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from shared import codec, wire
from shared.errors import (
    TeacherAnswerError,
    TeacherChangedError,
    TokenizerMismatchError,
    error_from_problem,
)
from shared.protocol import (
    Completion,
    GenerateEnd,
    GenerateRequest,
    InfoResponse,
    LogprobDtype,
    ScoreRequest,
    ScoreResponse,
    ScoreSequence,
    TeacherIdentity,
)
from shared.sparse import SparseLogprobs
from student_trainer.teacher.base import (
    Sampling,
    ScoreOptions,
    Sequences,
    check_all_scores,
    check_completion,
    no_such_model,
    sequence_of,
)
from student_trainer.teacher.deprecated import former_score_parameters
from student_trainer.teacher.http import ServerKind
from student_trainer.teacher.replicas import Replicas, connected_info
from student_trainer.teacher.retry import FAILOVER_ERRORS, Unreachable
from student_trainer.teacher.sparse_gkd_messages import (
    MAX_BYTES_BESIDE_ARRAYS,
    body_bytes,
    max_answer_bytes,
    request_info,
    request_limits,
    request_message,
    requested_width,
    stream_messages,
)
from student_trainer.teacher.split import split_and_send

logger = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")

SERVER = ServerKind(wire.MSGPACK_MEDIA_TYPE, ready="/ready", start="teacher-server serve MODEL")


class SparseGkdTeacher:
    """A `Teacher` client of sparse-gkd's own server, with the protocol of `shared.protocol`.

    Args:
        urls: addresses of replicas of one teacher, such as ``http://host:8000``.
        timeout: seconds to wait for a teacher: at `connect`, and for each request with retries.
        accept_change: continue when the teacher's identity changes in the middle of a run.
        logprob_dtype: dtype of log-probs on the wire; next token and tail are always float32.
        api_key: the teacher's key, sent as ``Authorization: Bearer``.
        unreachable, absent_timeout, local_absent_timeout: as in
            `student_trainer.teacher.replicas.Replicas`.
        model: the model to ask at a server of several; None for ``name``, or for its first.
        name: the teacher's name, which is its model's at a server of several, or empty.
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
        absent_timeout: float = math.inf,
        local_absent_timeout: float = math.inf,
        model: str | None = None,
        name: str = "",
    ) -> None:
        self._wanted_model, self._name = model, name
        self.accept_change = accept_change
        self.logprob_dtype = logprob_dtype
        self._info: InfoResponse | None = None
        self._lock = threading.Lock()
        self._replicas = Replicas(
            urls,
            SERVER,
            timeout=timeout,
            rejoins=self._rejoins,
            api_key=api_key,
            unreachable=unreachable,
            absent_timeout=absent_timeout,
            local_absent_timeout=local_absent_timeout,
            name=name,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the client; requests in flight fail."""
        self._replicas.close()

    @property
    def info(self) -> InfoResponse:
        """The teacher's description of itself, known since `connect`."""
        return connected_info(self._info)

    @property
    def connected(self) -> bool:
        return self._info is not None

    @property
    def live(self) -> Self:
        return self

    def submit(
        self, call: Callable[P, list[R]], *arguments: P.args, **options: P.kwargs
    ) -> Future[list[R]]:
        """Run this teacher's `score` or `generate` in a thread."""
        return self._replicas.submit(call, *arguments, **options)

    def take_traffic(self) -> tuple[int, int]:
        """Return (bytes received, completion tokens scored) since the last call."""
        return self._replicas.traffic.take()

    def take_lookups(self) -> tuple[int, int, int]:
        """Return zeros, because there is no cache."""
        return 0, 0, 0

    @property
    def urls(self) -> Sequence[str]:
        """The addresses of the replicas."""
        return self._replicas.urls

    @property
    def named_model(self) -> str | None:
        """The model that follows the address; None where none does."""
        return self._wanted_model

    @property
    def name(self) -> str:
        """The teacher's name, or empty."""
        return self._name

    def switched_off(self) -> bool:
        """Return whether nothing listens at any address; a server that loads its model listens.

        Raises:
            TeacherUnreachableError: a certificate is not trusted.
        """
        return self._replicas.switched_off()

    def ready(self) -> bool:
        """Return whether `connect` need not wait; where it must, log for whom."""
        return self._replicas.ready()

    def connect(self) -> InfoResponse:
        """Wait until every replica is ready, and return the description, as `Teacher.connect`."""
        self._info = self._replicas.connect(self._get_info, self._info)
        return self._info

    @former_score_parameters
    def score(
        self,
        sequences: Sequences,
        options: ScoreOptions,
        *,
        requested: Sequence[NDArray[np.uint32]] | None = None,
    ) -> list[SparseLogprobs]:
        """Return the distributions at every completion position, as `Teacher.score`."""
        requested_ids = [None] * len(sequences) if requested is None else list(requested)
        items = [
            ScoreSequence(token_ids=ids, completion_start=start, requested_token_ids=more)
            for (ids, start), more in zip(sequences, requested_ids, strict=True)
        ]
        widths = [requested_width(more) for more in requested_ids]
        envelope = ScoreRequest(
            sequences=[],
            top_k=options.top_k,
            temperature=options.temperature,
            logprob_dtype=self.logprob_dtype,
            sample_seed=options.sample_seed,
            model=self._model,
        )
        costs = [
            (1, len(ids), (len(ids) - start) * (options.top_k + width), body_bytes(item))
            for (ids, start), width, item in zip(sequences, widths, items, strict=True)
        ]

        def send(first: int, last: int) -> list[SparseLogprobs]:
            request = envelope.model_copy(update={"sequences": items[first:last]})
            tokens = sum(len(ids) for ids, _ in sequences[first:last])
            body = wire.dump(request, wire.MSGPACK_MEDIA_TYPE)
            most = MAX_BYTES_BESIDE_ARRAYS + sum(map(max_answer_bytes, costs[first:last]))

            def scored(url: str) -> list[SparseLogprobs]:
                answer = request_message(
                    self._replicas.http, "POST", url, "/v1/score", ScoreResponse, body, most=most
                )
                self._check_identity(url, answer.teacher)
                check_all_scores(
                    url,
                    answer.sequences,
                    sequences[first:last],
                    top_k=options.top_k,
                    requested=widths[first:last],
                    offset=first,
                    vocab_size=self.info.vocab_size,
                    drawn=options.sample_seed is not None,
                )
                self._replicas.traffic.count_scored(sum(map(len, answer.sequences)))
                return answer.sequences

            return self._replicas.call(scored, lambda: tokens)

        return split_and_send(costs, request_limits(self.info.limits, envelope), send)

    def generate(
        self, prompts: Sequence[NDArray[np.uint32]], sampling: Sampling
    ) -> list[Completion]:
        """Return a completion of each prompt [P], as `Teacher.generate`."""
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
            model=self._model,
        )
        longest, top_k = sampling.max_new_tokens, sampling.top_k or 0
        costs = [
            (1, len(ids) + longest, longest * top_k, len(codec.encode(ids))) for ids in prompts
        ]
        finished: dict[int, Completion] = {}

        def accept(url: str, index: int, completion: Completion) -> None:
            self._check_completion(url, index, prompts[index], completion, sampling)
            finished[index] = completion

        def missing(first: int, last: int) -> list[int]:
            return [index for index in range(first, last) if index not in finished]

        def send(first: int, last: int) -> list[Completion]:
            # A completion is a function of seed and prompt alone, so those that arrived before a
            # connection broke or a request was halved are not requested again.
            while indices := missing(first, last):
                request = envelope.model_copy(update={"prompts": [prompts[i] for i in indices]})
                body = wire.dump(request, wire.MSGPACK_MEDIA_TYPE)
                receive = partial(self._receive, body=body, indices=indices, accept=accept)
                self._replicas.call(
                    receive, lambda: sum(costs[index][1] for index in missing(first, last))
                )
            return [finished[index] for index in range(first, last)]

        return split_and_send(costs, request_limits(self.info.limits, envelope), send)

    def _receive(
        self,
        url: str,
        *,
        body: bytes,
        indices: Sequence[int],
        accept: Callable[[str, int, Completion], None],
    ) -> None:
        """Call ``accept`` with the completions of one streamed answer: all, or some if it breaks.

        Args:
            body: a `GenerateRequest` of the prompts whose numbers are ``indices``.

        Raises:
            TeacherAnswerError: a malformed answer, or completions that were not requested.
            TeacherChangedError: another teacher answered; none of its completions is accepted.
            ProtocolError, httpx.TransportError: no completion came; `Replicas.call` tries again.
        """
        path = "/v1/generate"
        waiting = dict(enumerate(indices))  # index in the request -> number of the prompt
        try:
            with self._replicas.http.stream(url, "POST", path, body) as chunks:
                for message in stream_messages(url + path, chunks):
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
                            f"{message.prompt}, which was not requested or had come before"
                        )
                    accept(url, index, message.completion)
                    chunks.extend()
        except FAILOVER_ERRORS as error:
            if len(waiting) == len(indices):
                raise
            logger.warning(
                "The answer of %s broke off (%s); %d of its %d completions are requested again",
                url, error, len(waiting), len(indices),
            )  # fmt: skip
        else:
            if waiting:
                raise TeacherAnswerError(
                    f"{len(indices)} completions were requested, {url} answered "
                    f"{len(indices) - len(waiting)}"
                )

    @property
    def _model(self) -> str | None:
        """The model that requests name: None for a server's first, which answers without a name."""
        info = self.info
        first = info.models[0] if info.models else info.teacher
        return None if info.teacher.model == first.model else info.teacher.model

    def _get_info(self, url: str) -> InfoResponse:
        """Return the description of the server, with the identity of the teacher that is meant.

        Raises:
            TeacherAnswerError: it does not serve that model.
        """
        info = request_info(self._replicas.http, url)
        meant = self.meant_by(info)
        if meant is None:
            names = [one.model for one in info.models or [info.teacher]]
            raise no_such_model(url, self._wanted_model or self._name, names, self._name)
        return meant

    def meant_by(self, info: InfoResponse) -> InfoResponse | None:
        """Return a server's description as that of this teacher; None if it is not served there."""
        model = self._wanted_model
        if model is None and len(info.models) > 1:
            model = self._name or None
        served = info.served_as(model)
        return None if served is None else info.model_copy(update={"teacher": served})

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
            raise TeacherAnswerError(f"{url}: completion {index} came without the requested scores")
        check_all_scores(
            url,
            [completion.scores],
            [sequence_of(prompt, completion)],
            top_k=sampling.top_k,
            offset=index,
            vocab_size=self.info.vocab_size,
        )
        self._replicas.traffic.count_scored(len(completion.scores))

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
        """Return whether a replica that is ready again is the same teacher as the others.

        With ``accept_change``, another teacher is accepted only if no replica of the first is left,
        so that two teachers never answer at the same time.

        Raises:
            TeacherChangedError: it is another teacher, without ``accept_change``.
        """
        identity = self._get_info(url).teacher
        if identity != self.info.teacher and not self.accept_change:
            raise self._changed(url, identity)
        return identity == self.info.teacher

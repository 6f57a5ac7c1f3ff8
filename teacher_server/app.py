"""Routes: HTTP in, jobs to the backend, HTTP out. Knows no model."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import math
import os
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

import numpy as np
from fastapi import FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import HTMLResponse, StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from shared import __version__, codec, logs, wire
from shared.errors import (
    DeadlineExceededError,
    InternalError,
    InvalidRequestError,
    MalformedRequestError,
    MethodNotAllowedError,
    NotFoundError,
    PayloadTooLargeError,
    ProtocolError,
    UnauthorizedError,
    UnavailableError,
    UnsupportedMediaTypeError,
)
from shared.protocol import (
    PROTOCOL_VERSION,
    Completion,
    GenerateEnd,
    GenerateEvent,
    GenerateRequest,
    GenerateResponse,
    InfoResponse,
    Limits,
    Problem,
    ScoreRequest,
    ScoreResponse,
    ScoreSequence,
)
from shared.sparse import SparseLogprobs
from shared.text import StopStrings
from shared.validation import check_generate_request, check_score_request
from teacher_server.backends.base import Backend, GenerateJob, ScoreJob, ScoreOptions
from teacher_server.http.docs_page import PAGE
from teacher_server.limits.admission import Admission, ClientGoneError, HeldBytes
from teacher_server.limits.auth import ApiKeys
from teacher_server.limits.pool import FairPool
from teacher_server.limits.single_flight import SingleFlight
from teacher_server.metrics import Metrics, State
from teacher_server.openai.adapter import OpenAIAdapter
from teacher_server.openai.answers import error_body, model_card
from teacher_server.openai.plan import OpenAIPlan, check_model
from teacher_server.openai.schema import ChatRequest, CompletionRequest
from teacher_server.settings import Settings

logger = logging.getLogger(__name__)

R = TypeVar("R")
Q = TypeVar("Q")
J = TypeVar("J", ScoreJob, GenerateJob)

_MEDIA_TYPES = (wire.MSGPACK_MEDIA_TYPE, wire.JSON_MEDIA_TYPE)
_REQUEST_ID = "X-Request-Id"
_CLIENT_ID = "X-Client-Id"
_LONGEST_CLIENT_ID = 64
_CLIENT_GONE = 499
_PIECE_BYTES = 64 << 10
# What an answer takes while it is made, for each byte of its arrays: msgpack packs a copy, JSON
# makes Python's numbers first, then text.
_COPIES = {wire.MSGPACK_MEDIA_TYPE: 2, wire.JSON_MEDIA_TYPE: 16}
_OPENAI_COPIES = 40
# Tokenizing a text takes about so many times as long as reading it.
_TOKENIZED = 8
# Making JSON of an array, pydantic lets no other thread run.
_MAX_JSON_ARRAYS = 4 << 20
# Jobs of a request that are handed to the backend at a time: in between others have their turn.
_STARTED_AT_ONCE = 32
# What a load balancer asks, which has no key. Every other route of ours wants one.
_OPEN = ("/health", "/ready")
# Asked every few seconds, whatever happens: in the log for those who look for it alone.
_PROBES = (*_OPEN, "/metrics")


class _Reply(Response):
    """Says when it has been sent.

    Attributes:
        patience: seconds that the caller has to take a piece of it.
        ended: is told the status, when all is sent or nobody takes it.
    """

    patience = math.inf
    ended: Callable[[int], None]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, _in_pieces(send, self.patience))
        except TimeoutError:
            logger.warning("A caller has taken nothing for %g s; hanging up", self.patience)
        finally:
            self.ended(self.status_code)


class _Stream(StreamingResponse):
    """Sends items as they come, and says at the end how it went.

    Attributes:
        outcome: the status that it would have had, had it been known at the beginning.
        patience, ended: as of `_Reply`, with the outcome as status.
    """

    body_iterator: AsyncGenerator[bytes, None]
    patience = math.inf
    ended: Callable[[int], None]

    def __init__(self, items: AsyncGenerator[bytes, None], media_type: str) -> None:
        super().__init__(items, media_type=media_type)
        self.outcome = 200

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # The items watch for a caller who leaves; starlette's own watch would do it twice.
        try:
            await self.stream_response(_in_pieces(send, self.patience))
        except TimeoutError:
            self.outcome = _CLIENT_GONE
            logger.warning("A caller has taken nothing for %g s; hanging up", self.patience)
        finally:
            await self.body_iterator.aclose()
            self.ended(self.outcome)


def _in_pieces(send: Send, patience: float) -> Send:
    """``send`` that waits for a slow reader after every piece, where the whole would be buffered.

    Raises:
        TimeoutError: nothing was taken for ``patience`` seconds.
    """

    async def send_pieces(message: Message) -> None:
        body = message.get("body", b"")
        for start in range(0, max(1, len(body)), _PIECE_BYTES):
            piece, end = message, start + _PIECE_BYTES
            if end < len(body) or start:
                more = end < len(body) or message.get("more_body", False)
                piece = {**message, "body": bytes(body[start:end]), "more_body": more}
            async with asyncio.timeout(patience):
                await send(piece)

    return send_pieces


@dataclass(frozen=True)
class _Body:
    """A request's body as it came, of at most ``limit`` bytes."""

    data: bytearray
    media_type: str
    limit: int


Answer = _Reply | _Stream
Handler = Callable[[Request, str], Awaitable[Answer]]
Refusal = Callable[[ProtocolError, str], _Reply]


class TeacherApp:
    """The application and its state: no backend while the model loads."""

    def __init__(self, settings: Settings, metrics: Metrics, keys: ApiKeys) -> None:
        self.settings = settings
        self.metrics = metrics
        self.keys = keys
        self.admission = Admission(
            settings.max_queued_tokens, settings.max_held_mib << 20, settings.request_timeout,
            metrics,
        )  # fmt: skip
        self.pool = FairPool(min(16, max(4, os.cpu_count() or 1)))
        self.in_flight = SingleFlight(metrics.shared.inc)
        self.backend: Backend | None = None
        self.info: InfoResponse | None = None
        self.openai = OpenAIAdapter(settings.model, trust_remote_code=settings.trust_remote_code)
        self.api = self._build()
        metrics.show_state(lambda: self.state)
        metrics.build.info(
            {
                "version": __version__,
                "backend": settings.engine,
                "model": settings.served_model_name or settings.model,
            }
        )

    @property
    def state(self) -> State:
        """Requests are taken when it is "ready"."""
        if self.admission.draining:
            return "draining"
        if self.backend is None:
            return "loading"
        return "ready" if self.backend.alive else "dead"

    def ready(self, backend: Backend) -> None:
        """Begin to answer with ``backend``."""
        facts = backend.facts
        self.info = InfoResponse(
            protocol_version=PROTOCOL_VERSION,
            teacher=facts.teacher,
            tokenizer=facts.tokenizer,
            vocab_size=facts.vocab_size,
            max_model_len=facts.max_model_len,
            eos_token_ids=[i for i in facts.eos_token_ids if 0 <= i < facts.vocab_size],
            limits=Limits(
                max_body_bytes=self.settings.max_request_bytes,
                max_tokens=self.settings.max_request_tokens,
                max_top_k=min(self.settings.max_top_k, facts.vocab_size),
            ),
            capabilities=facts.capabilities,
        )
        self.backend = backend

    def _build(self) -> FastAPI:
        api = FastAPI(
            title="sparse-gkd teacher server", version=__version__, redirect_slashes=False,
            docs_url=None, redoc_url=None,  # their pages load programs from another host
        )  # fmt: skip
        api.add_api_route("/docs", _docs, include_in_schema=False)
        routes: dict[str, tuple[str, Handler]] = {
            "/v1/score": ("POST", self._score),
            "/v1/generate": ("POST", self._generate),
            "/v1/info": ("GET", self._get_info),
            "/health": ("GET", self._health),
            "/ready": ("GET", self._ready),
            "/metrics": ("GET", self._metrics),
            "/v1/models": ("GET", self._models),
            "/v1/models/{name:path}": ("GET", self._model),
            "/v1/completions": ("POST", self._completions),
            "/v1/chat/completions": ("POST", self._chat),
        }
        for path, (method, handler) in routes.items():
            refusal = _openai_error if path in _OPENAI else _problem
            api.add_api_route(
                path, self._endpoint(path, handler, refusal), methods=[method], response_model=None,
                summary=(handler.__doc__ or "").split("\n")[0], openapi_extra=_documented(path),
            )  # fmt: skip
        api.add_exception_handler(HTTPException, self._unknown_route)
        api.openapi = lambda: _openapi(api)  # type: ignore[method-assign]
        api.openapi()  # made now, and not while requests wait
        return api

    def _endpoint(
        self, path: str, handler: Handler, refusal: Refusal
    ) -> Callable[[Request], Awaitable[Answer]]:
        """``handler`` with a request id, metrics, and a ``refusal`` for every error."""

        async def endpoint(request: Request) -> Answer:
            request_id = _request_id(request)
            ended = self._begun(request, path, request_id)
            try:
                if path not in _OPEN:
                    self._identify(request)
                response = await handler(request, request_id)
                response.headers[_REQUEST_ID] = request_id
            except (ClientGoneError, ClientDisconnect):
                response = _Reply(status_code=_CLIENT_GONE)
            except Exception as error:
                response = refusal(self._shown(error, request_id), request_id)
            if getattr(request.state, "hang_up", False):
                # Kept open, the connection would go on to receive what nobody will read.
                response.headers["Connection"] = "close"
            response.ended = ended
            response.patience = self.admission.request_timeout
            return response

        return endpoint

    def _begun(self, request: Request, route: str, request_id: str) -> Callable[[int], None]:
        """What is to be told the status once the answer is sent, or nobody takes it."""
        logs.bind(request_id=request_id)  # uvicorn gives each request a task of its own
        since = time.perf_counter()

        def ended(status: int) -> None:
            seconds = time.perf_counter() - since
            self.metrics.requests.labels(route, str(status)).inc()
            self.metrics.latency.labels(route).observe(seconds)
            _log_access(request, route, status, seconds)
            if hasattr(request.state, "held"):
                request.state.held.free()

        return ended

    def _identify(self, request: Request) -> None:
        """Return the client: a key, or an address. Nothing of the body is read.

        Raises:
            UnauthorizedError: no key, where one is needed.
        """
        try:
            client = self.keys.check(request.headers.get("authorization"))
        except UnauthorizedError:
            request.state.hang_up = True
            raise
        if not client:
            # What a caller calls itself is for the log: names cost nothing, and give no share.
            client = "" if request.client is None else request.client.host
            request.state.name = request.headers.get(_CLIENT_ID, "")[:_LONGEST_CLIENT_ID]
        request.state.client = client
        request.state.held = HeldBytes(self.admission.bytes, client)

    def _shown(self, error: Exception, request_id: str) -> ProtocolError:
        """What the caller is told of ``error``; the log keeps what was not meant for it."""
        if not isinstance(error, ProtocolError):
            logger.error("Request %s failed", request_id, exc_info=error)
            return InternalError(f"internal error; the log of request {request_id} says more")
        self.metrics.rejected.labels(error.slug()).inc()
        return error

    async def _score(self, request: Request, request_id: str) -> Answer:
        """Sparse log-probs of token sequences."""
        backend, info = self._loaded()
        body = await self._body(request)
        jobs = await self._in_pool(
            request, len(body.data), _read_score, body, info, request.state.client
        )
        _hold_answer(request, [job for _, job in jobs], "sequences")
        with self._admit(request, jobs):
            scored: list[SparseLogprobs] = await self.admission.run(
                _all([self._scored(backend, *job) for job in jobs], "sequences"),
                lambda: _disconnected(request),
            )
            self._count_scored([job for _, job in jobs])
            answer = ScoreResponse.model_construct(
                sequences=scored, teacher=info.teacher, request_id=request_id
            )
            return await self._answer(request, answer)

    async def _scored(self, backend: Backend, key: bytes, job: ScoreJob) -> SparseLogprobs:
        """Of an equal job of the same client that is under way, or of its own.

        Scores depend on the job alone; but another client's may wait for that client's turn.
        """
        return await self.in_flight.run(key, lambda: backend.score(job))

    async def _generated(self, backend: Backend, key: bytes, job: GenerateJob) -> Completion:
        """As `_scored`: a job with a seed, or a greedy one, is written the same again."""
        return await self.in_flight.run(key, lambda: backend.generate(job))

    async def _generate(self, request: Request, request_id: str) -> Answer:
        """Completions of prompts, with sparse log-probs when asked."""
        backend, info = self._loaded()
        body = await self._body(request)
        asked, jobs = await self._in_pool(
            request, len(body.data), _read_generate, body, info, request.state.client
        )
        _hold_answer(request, [job for _, job in jobs], "prompts")
        if asked.stream:
            return await self._stream(request, request_id, jobs, asked.n)
        with self._admit(request, jobs):
            flat: list[Completion] = await self.admission.run(
                _all([self._generated(backend, *job) for job in jobs], "prompts", asked.n),
                lambda: _disconnected(request),
            )
            self._count_generated([job for _, job in jobs], flat)
            answer = GenerateResponse.model_construct(
                completions=[flat[i : i + asked.n] for i in range(0, len(flat), asked.n)],
                teacher=info.teacher,
                request_id=request_id,
            )
            return await self._answer(request, answer)

    async def _stream(
        self, request: Request, request_id: str, jobs: Sequence[tuple[bytes, GenerateJob]], n: int
    ) -> Answer:
        """Each completion when it is finished.

        What fails before the first one is an ordinary refusal, so the response waits for it.
        """
        backend, info = self._loaded()
        media_type = wire.STREAM_MEDIA_TYPES[_accepted(request)]
        finished = self._as_they_finish(request, backend, info, jobs, n)
        first = await anext(finished)

        size = max(job.answer_bytes for _, job in jobs)

        async def items() -> AsyncGenerator[bytes, None]:
            problem = None
            client = request.state.client
            try:
                yield await self.pool.run(client, size, wire.dump, first, media_type)
                async for event in finished:
                    yield await self.pool.run(client, size, wire.dump, event, media_type)
            except ClientGoneError:
                stream.outcome = _CLIENT_GONE
                return
            except Exception as error:
                shown = self._shown(error, request_id)
                stream.outcome = shown.status
                problem = Problem.model_validate(shown.to_problem(request_id))
            finally:
                await finished.aclose()
            end = GenerateEnd(teacher=info.teacher, request_id=request_id, problem=problem)
            yield wire.dump(end, media_type)

        stream = _Stream(items(), media_type)
        return stream

    async def _as_they_finish(
        self,
        request: Request,
        backend: Backend,
        info: InfoResponse,
        jobs: Sequence[tuple[bytes, GenerateJob]],
        n: int,
    ) -> AsyncGenerator[GenerateEvent, None]:
        """Completions in the order they finish; then raises what kept the others from it.

        The work goes on, and its place in the queue is free again, however slowly this is read.
        """
        finished: asyncio.Queue[GenerateEvent | None] = asyncio.Queue()

        async def one(index: int, key: bytes, job: GenerateJob) -> None:
            completion = await self._generated(backend, key, job)
            self._count_generated([job], [completion])
            finished.put_nowait(
                GenerateEvent.model_construct(
                    prompt=index // n,
                    sample=index % n,
                    completion=completion,
                    teacher=info.teacher,
                )
            )

        async def all_of_them() -> None:
            with self._admit(request, jobs):
                await self.admission.run(
                    _all([one(index, *job) for index, job in enumerate(jobs)], "prompts", n),
                    lambda: _disconnected(request),
                )

        work = asyncio.ensure_future(all_of_them())
        work.add_done_callback(lambda _: finished.put_nowait(None))
        try:
            while (event := await finished.get()) is not None:
                yield event
            await work
        finally:
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)

    def _count_scored(self, jobs: list[ScoreJob]) -> None:
        rows = sum(job.rows for job in jobs)
        self.metrics.tokens.labels("scored").inc(rows)
        self.metrics.tokens.labels("prompt").inc(sum(job.tokens for job in jobs) - rows)

    def _count_generated(self, jobs: list[GenerateJob], completions: list[Completion]) -> None:
        self.metrics.tokens.labels("generated").inc(sum(len(c.token_ids) for c in completions))
        self.metrics.tokens.labels("prompt").inc(sum(len(job.prompt) for job in jobs))

    async def _models(self, request: Request, request_id: str) -> Answer:
        """OpenAI-style list of the one model."""
        return _json({"object": "list", "data": [model_card(self._loaded()[1])]})

    async def _model(self, request: Request, request_id: str) -> Answer:
        """OpenAI-style description of the model."""
        info = self._loaded()[1]
        check_model(request.path_params["name"], info)
        return _json(model_card(info))

    async def _completions(self, request: Request, request_id: str) -> Answer:
        """OpenAI-style completions, with vLLM's prompt_logprobs."""
        return await self._speak(request, request_id, CompletionRequest)

    async def _chat(self, request: Request, request_id: str) -> Answer:
        """OpenAI-style chat completions."""
        return await self._speak(request, request_id, ChatRequest)

    async def _speak(
        self,
        request: Request,
        request_id: str,
        model: type[CompletionRequest] | type[ChatRequest],
    ) -> Answer:
        backend, info = self._loaded()
        body = await self._body(request, (wire.JSON_MEDIA_TYPE,))
        plan, to_score, to_write = await self._in_pool(
            request, len(body.data) * _TOKENIZED, self._plan, model, body, info,
            request.state.client,
        )  # fmt: skip
        jobs: list[tuple[bytes, ScoreJob | GenerateJob]] = [*to_score, *to_write]
        size = sum(job.answer_bytes for _, job in jobs) * _OPENAI_COPIES
        request.state.held.add(size)
        with self._admit(request, jobs):
            scored, written = await self.admission.run(
                _both(
                    _all([self._scored(backend, *job) for job in to_score], "prompt"),
                    _all(
                        [self._generated(backend, *job) for job in to_write],
                        "prompt",
                        plan.request.n or 1,
                    ),
                ),
                lambda: _disconnected(request),
            )
            self._count_scored([job for _, job in to_score])
            self._count_generated([job for _, job in to_write], written)
            answer = await self._in_pool(
                request, size, self.openai.answer, plan, scored, written, info, request_id
            )
            return _Reply(memoryview(answer), media_type=wire.JSON_MEDIA_TYPE)

    def _plan(
        self,
        model: type[CompletionRequest] | type[ChatRequest],
        body: _Body,
        info: InfoResponse,
        client: str,
    ) -> tuple[OpenAIPlan, list[tuple[bytes, ScoreJob]], list[tuple[bytes, GenerateJob]]]:
        """Return the jobs of an OpenAI-style request, with their keys."""
        request = wire.load(model, body.data, body.media_type, max_bytes=body.limit)
        plan = self.openai.plan(request, info)
        to_score = [] if plan.score is None else _score_jobs(plan.score, client)
        to_write = [] if plan.generate is None else _generate_jobs(plan.generate, client, plan.stop)
        return plan, _keyed(to_score), _keyed(to_write)

    async def _get_info(self, request: Request, request_id: str) -> Answer:
        """What the teacher is, its limits and what it can do."""
        return await self._answer(request, self._loaded()[1])

    async def _health(self, request: Request, request_id: str) -> Answer:
        """200 while the process answers, however busy; 503 when its engine died: restart it."""
        self._check_alive()
        return _Reply('{"status":"ok"}', media_type=wire.JSON_MEDIA_TYPE)

    async def _ready(self, request: Request, request_id: str) -> Answer:
        """200 when requests are taken; 503 while loading or draining, or when the engine died."""
        self._loaded()
        return _Reply('{"status":"ready"}', media_type=wire.JSON_MEDIA_TYPE)

    async def _metrics(self, request: Request, request_id: str) -> Answer:
        """Prometheus metrics."""
        return _Reply(self.metrics.exposition(), media_type=CONTENT_TYPE_LATEST)

    async def _unknown_route(self, request: Request, error: Exception) -> Answer:
        assert isinstance(error, HTTPException)
        detail = f"{request.method} {request.url.path}: {error.detail}; see /docs"
        refusal = MethodNotAllowedError if error.status_code == 405 else NotFoundError
        self.metrics.rejected.labels(refusal.slug()).inc()
        request_id = _request_id(request)
        ended = self._begun(request, "other", request_id)
        response = _problem(refusal(detail), request_id)
        response.headers.update(error.headers or {})  # Allow, for 405
        response.ended = ended
        return response

    def _loaded(self) -> tuple[Backend, InfoResponse]:
        if self.admission.draining:
            raise UnavailableError("the server is shutting down", retry_after=1.0)
        if self.backend is None or self.info is None:
            raise UnavailableError("the model is loading", retry_after=1.0)
        self._check_alive()
        return self.backend, self.info

    def _check_alive(self) -> None:
        if self.backend is not None and not self.backend.alive:
            raise UnavailableError("the engine is dead; restart the server")

    def _admit(
        self, request: Request, jobs: Sequence[tuple[bytes, ScoreJob | GenerateJob]]
    ) -> AbstractContextManager[None]:
        tokens = sum(job.tokens for _, job in jobs)
        request.state.work = {"sequences": len(jobs), "tokens": tokens}
        return self.admission.admit(request.state.client, tokens, len(jobs))

    async def _in_pool(
        self, request: Request, cost: int, function: Callable[..., R], *arguments: Any
    ) -> R:
        """``function(*arguments)`` in a thread, at the client's turn and under its deadline."""
        return await self.admission.run(
            self.pool.run(request.state.client, cost, function, *arguments),
            lambda: _disconnected(request),
        )

    async def _answer(self, request: Request, message: BaseModel) -> Answer:
        media_type = _accepted(request)
        size = request.state.held.bytes
        body = await self._in_pool(request, size, wire.dump, message, media_type)
        return _Reply(body, media_type=media_type)

    async def _body(self, request: Request, media_types: tuple[str, ...] = _MEDIA_TYPES) -> _Body:
        """The request's body; its size is bounded while it is read."""
        media_type = request.headers.get("content-type", "").split(";")[0].strip().lower()
        if media_type not in media_types:
            raise UnsupportedMediaTypeError(
                f"Content-Type {media_type!r} is not one of {', '.join(media_types)}"
            )
        encoding = request.headers.get("content-encoding", "identity")
        if encoding != "identity":
            raise UnsupportedMediaTypeError(f"Content-Encoding {encoding!r} is not supported")
        _accepted(request)  # an answer nobody can read is refused before it is computed
        limit = self.settings.max_request_bytes
        if media_type == wire.JSON_MEDIA_TYPE:
            limit = min(limit, wire.MAX_JSON_REQUEST_BYTES)
        declared = request.headers.get("content-length", "")
        expected = int(declared) if declared.isdigit() else 0
        body = bytearray()
        patience = self.settings.request_timeout
        try:
            if expected > limit:
                raise PayloadTooLargeError(
                    f"the body has {expected} bytes; the limit is {limit} in {media_type}"
                )
            request.state.held.add(expected)
            async with asyncio.timeout(patience):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > limit:
                        raise PayloadTooLargeError(f"the body has over {limit} bytes, the limit")
                    if len(body) > expected:  # nothing was declared
                        request.state.held.add(len(body) - expected)
                        expected = len(body)
        except TimeoutError as error:
            request.state.hang_up = True
            raise DeadlineExceededError(f"the body did not arrive in {patience:g} s") from error
        except ProtocolError:
            request.state.hang_up = True
            raise
        if not body:
            raise MalformedRequestError("the body is empty")
        return _Body(body, media_type, limit)


def _read_score(body: _Body, info: InfoResponse, client: str) -> list[tuple[bytes, ScoreJob]]:
    """The jobs of a request, each with its key, checked."""
    asked = wire.load(ScoreRequest, body.data, body.media_type, max_bytes=body.limit)
    check_score_request(asked, info)
    return _keyed(_score_jobs(asked, client))


def _read_generate(
    body: _Body, info: InfoResponse, client: str
) -> tuple[GenerateRequest, list[tuple[bytes, GenerateJob]]]:
    """The same of a request to generate, and what it says of all of them."""
    asked = wire.load(GenerateRequest, body.data, body.media_type, max_bytes=body.limit)
    check_generate_request(asked, info)
    return asked, _keyed(_generate_jobs(asked, client))


def _score_jobs(asked: ScoreRequest, client: str) -> list[ScoreJob]:
    return [
        ScoreJob(
            sequence.token_ids,
            sequence.completion_start,
            asked.top_k,
            asked.temperature,
            sequence.requested_token_ids,
            asked.logprob_dtype,
            None if asked.sample_seed is None else _draw_key(asked.sample_seed, sequence),
            client,
        )
        for sequence in asked.sequences
    ]


def _draw_key(seed: int, sequence: ScoreSequence) -> bytes:
    """Of the content, so that a sequence meets the same draws in whatever request it comes."""
    content = seed.to_bytes(8, "little") + sequence.token_ids.astype("<u4").tobytes()
    return hashlib.sha256(content).digest()


def _keyed(jobs: list[J]) -> list[tuple[bytes, J]]:
    return [(_question(job), job) for job in jobs]


def _question(job: ScoreJob | GenerateJob) -> bytes:
    """What a job asks, as a digest; with the client in it."""
    values = [getattr(job, field.name) for field in fields(job)]
    nested = ScoreOptions | StopStrings
    plain = [asdict(value) if isinstance(value, nested) else value for value in values]
    return hashlib.sha256(codec.encode(plain)).digest()


def _generate_jobs(
    asked: GenerateRequest, client: str, stop: StopStrings | None = None
) -> list[GenerateJob]:
    drawn = asked.temperature > 0 and asked.seed is None
    seed = int.from_bytes(os.urandom(7)) if drawn else asked.seed or 0
    stops = () if asked.stop_token_ids is None else tuple(np.unique(asked.stop_token_ids).tolist())
    score = None
    if asked.top_k is not None:
        score = ScoreOptions(asked.top_k, asked.score_temperature, asked.logprob_dtype)
    return [
        GenerateJob(
            prompt=prompt,
            max_new_tokens=asked.max_new_tokens,
            temperature=asked.temperature,
            top_p=asked.top_p,
            sampling_top_k=asked.sampling_top_k,
            key=(seed, prompt.astype("<u4").tobytes(), number),
            stop_token_ids=stops,
            score=score,
            client=client,
            stop=stop,
        )
        for prompt in asked.prompts
        for number in range(asked.n)
    ]


async def _all(work: list[Coroutine[Any, Any, R]], field: str, jobs_each: int = 1) -> list[R]:
    """Results in order; the first failure cancels the rest, and is told which item failed."""

    async def one(index: int, item: Coroutine[Any, Any, R]) -> R:
        try:
            return await item
        except (InternalError, PayloadTooLargeError) as error:
            # Another than the one caught, which whoever asked for the same is told too.
            raise type(error)(error.detail, field=f"{field}.{index // jobs_each}") from error

    tasks: list[asyncio.Future[R]] = []
    try:
        for index, item in enumerate(work):
            tasks.append(asyncio.ensure_future(one(index, item)))
            if len(tasks) % _STARTED_AT_ONCE == 0:
                await asyncio.sleep(0)
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        for item in work[len(tasks) :]:
            item.close()


async def _both(first: Coroutine[Any, Any, R], second: Coroutine[Any, Any, Q]) -> tuple[R, Q]:
    """Both results; the first failure cancels the other."""
    tasks = asyncio.ensure_future(first), asyncio.ensure_future(second)
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


def _hold_answer(request: Request, jobs: Sequence[ScoreJob | GenerateJob], field: str) -> None:
    """Make room for the answer while it is made and sent.

    Raises:
        OverloadedError: there is none.
        InvalidRequestError: too large an answer for JSON.
    """
    media_type = _accepted(request)
    size = sum(job.answer_bytes for job in jobs)
    if media_type == wire.JSON_MEDIA_TYPE and size > _MAX_JSON_ARRAYS:
        raise InvalidRequestError(
            f"an answer of {size} bytes of arrays; the limit in JSON is {_MAX_JSON_ARRAYS}. Split "
            f"the request, or ask for {wire.MSGPACK_MEDIA_TYPE} by Accept",
            field=field,
        )
    request.state.held.add(size * _COPIES[media_type])


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _accepted(request: Request) -> str:
    """Media type of the answer: what Accept names first, else the request's, else JSON.

    A stream's media type stands for that of its items: one message is a stream of one.
    """
    accept = request.headers.get("accept", "*/*")
    wanted = [part.split(";")[0].strip().lower() for part in accept.split(",")]
    of_items = {stream: media_type for media_type, stream in wire.STREAM_MEDIA_TYPES.items()}
    for media_type in wanted:
        media_type = of_items.get(media_type, media_type)
        if media_type in _MEDIA_TYPES:
            return media_type
    if not {"*/*", "application/*", ""} & set(wanted):
        raise UnsupportedMediaTypeError(
            f"Accept {accept!r} holds none of {', '.join(_MEDIA_TYPES)}"
        )
    own = request.headers.get("content-type", "").split(";")[0].strip().lower()
    return own if own in _MEDIA_TYPES else wire.JSON_MEDIA_TYPE


def _request_id(request: Request) -> str:
    given = request.headers.get(_REQUEST_ID, "")
    printable = given.isascii() and given.replace("-", "").replace("_", "").isalnum()
    return given if printable and len(given) <= 64 else uuid.uuid4().hex


def _log_access(request: Request, route: str, status: int, seconds: float) -> None:
    """One line for each request, with nothing of what it holds: no text, no token ids, no key."""
    facts: dict[str, Any] = {
        "method": request.method,
        "route": route,
        "status": status,
        "seconds": round(seconds, 6),
        **getattr(request.state, "work", {}),
    }
    if hasattr(request.state, "client"):
        facts["client"] = f"{request.state.client} {getattr(request.state, 'name', '')}".strip()
    level = logging.DEBUG if route in _PROBES else logging.INFO
    logger.log(level, "%s %s %d in %.3f s", request.method, route, status, seconds, extra=facts)


def _problem(error: ProtocolError, request_id: str) -> _Reply:
    problem = Problem.model_validate(error.to_problem(request_id))
    body = problem.model_dump_json(exclude_none=True).encode()
    return _refused(error, request_id, body, "application/problem+json")


def _openai_error(error: ProtocolError, request_id: str) -> _Reply:
    return _refused(error, request_id, error_body(error), wire.JSON_MEDIA_TYPE)


def _refused(error: ProtocolError, request_id: str, body: bytes, media_type: str) -> _Reply:
    headers = {_REQUEST_ID: request_id}
    if isinstance(error, UnauthorizedError):
        headers["WWW-Authenticate"] = "Bearer"
    if error.retry_after is not None:
        headers["Retry-After"] = f"{max(1, round(error.retry_after))}"
    return _Reply(body, status_code=error.status, media_type=media_type, headers=headers)


async def _docs() -> HTMLResponse:
    return HTMLResponse(PAGE, headers={"Content-Security-Policy": _DOCS_POLICY})


def _json(value: Any) -> _Reply:
    return _Reply(json.dumps(value), media_type=wire.JSON_MEDIA_TYPE)


_DOCS_POLICY = "default-src 'self'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
_STREAMED: tuple[type[BaseModel], ...] = (GenerateEvent, GenerateEnd)
_BODIES: dict[str, tuple[type[BaseModel] | None, type[BaseModel]]] = {
    "/v1/score": (ScoreRequest, ScoreResponse),
    "/v1/generate": (GenerateRequest, GenerateResponse),
    "/v1/info": (None, InfoResponse),
}


# Routes that refuse with OpenAI's error body, and the requests of those that take one.
_OPENAI: dict[str, type[BaseModel] | None] = {
    "/v1/models": None,
    "/v1/models/{name:path}": None,
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatRequest,
}


def _documented(path: str) -> dict[str, Any]:
    """The OpenAPI entry of a route: one schema in both media types."""
    if spoken := _OPENAI.get(path):
        schema = {"$ref": f"#/components/schemas/{spoken.__name__}"}
        content = {wire.JSON_MEDIA_TYPE: {"schema": schema}}
        return {"requestBody": {"required": True, "content": content}}
    if path not in _BODIES:
        return {}
    asked, answered = _BODIES[path]

    def both(model: type[BaseModel]) -> dict[str, Any]:
        schema = {"$ref": f"#/components/schemas/{model.__name__}"}
        return {media_type: {"schema": schema} for media_type in reversed(_MEDIA_TYPES)}

    problem = {"schema": {"$ref": "#/components/schemas/Problem"}}
    answers = both(answered)
    if path == "/v1/generate":
        items = [{"$ref": f"#/components/schemas/{item.__name__}"} for item in _STREAMED]
        answers |= {
            stream: {"schema": {"oneOf": items}} for stream in wire.STREAM_MEDIA_TYPES.values()
        }
    entry: dict[str, Any] = {
        "responses": {
            "200": {"description": "The answer", "content": answers},
            "default": {
                "description": "Problem document (RFC 9457)",
                "content": {"application/problem+json": problem},
            },
        }
    }
    if asked is not None:
        entry["requestBody"] = {"required": True, "content": both(asked)}
    return entry


def _openapi(api: FastAPI) -> dict[str, Any]:
    if api.openapi_schema is None:
        schema = get_openapi(title=api.title, version=api.version, routes=api.routes)
        models = [m for pair in _BODIES.values() for m in pair if m is not None] + [Problem]
        models += _STREAMED
        models += [model for model in _OPENAI.values() if model is not None]
        _, definitions = models_json_schema(
            [(model, "validation") for model in models],
            ref_template="#/components/schemas/{model}",
        )
        bearer = {"type": "http", "scheme": "bearer"}
        schema["components"] = {
            "schemas": definitions["$defs"], "securitySchemes": {"bearer": bearer},
        }  # fmt: skip
        schema["security"] = [{"bearer": []}, {}]  # {}: a server without keys
        api.openapi_schema = schema
    return api.openapi_schema

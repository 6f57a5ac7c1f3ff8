"""A teacher without a model on a real socket, whose answers are right or scripted."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Protocol

import numpy as np

from shared import wire
from shared.protocol import (
    PROTOCOL_VERSION,
    Capabilities,
    Completion,
    GenerateEnd,
    GenerateEvent,
    GenerateRequest,
    InfoResponse,
    Limits,
    ScoreRequest,
    ScoreResponse,
    TeacherIdentity,
    TokenizerIdentity,
)
from shared.sparse import SparseLogprobs

IDENTITY = TeacherIdentity(
    model="stub", fingerprint="0" * 64, dtype="float32", backend="stub", version="1"
)
# A body in pieces is sent piece by piece; a piece whose making raises `BrokenError` cuts it.
Answer = tuple[int, dict[str, str], bytes | Iterable[bytes]]


def info(teacher: TeacherIdentity = IDENTITY, **changes: Any) -> InfoResponse:
    facts: dict[str, Any] = {
        "protocol_version": PROTOCOL_VERSION,
        "teacher": teacher,
        "tokenizer": TokenizerIdentity(
            fingerprint="1" * 64, vocab_size=100, special_token_ids={}, chat_template=None
        ),
        "vocab_size": 100,
        "max_model_len": 64,
        "eos_token_ids": [1],
        "limits": Limits(),
        "capabilities": Capabilities(temperature=True, requested_token_ids=True, generate=True),
    }
    return InfoResponse(**{**facts, **changes})


def scores(rows: int, k: int) -> SparseLogprobs:
    """Return the ids 0 … k−1 at each row, uniform over the vocabulary of 100."""
    uniform = np.full((rows, k), -np.log(100), np.float32)
    return SparseLogprobs(
        token_ids=np.tile(np.arange(k, dtype=np.uint32), (rows, 1)),
        logprobs=uniform,
        next_token_logprob=np.full(rows, -np.log(100), np.float32),
        tail_logprob=np.full(rows, np.log1p(-(k + 1) / 100), np.float32),
    )


def score_response(request: ScoreRequest, teacher: TeacherIdentity = IDENTITY) -> ScoreResponse:
    return ScoreResponse(
        sequences=[
            scores(len(s.token_ids) - s.completion_start, request.top_k) for s in request.sequences
        ],
        teacher=teacher,
        request_id="r",
    )


def packed(message: Any) -> Answer:
    body = wire.dump(message, wire.MSGPACK_MEDIA_TYPE)
    return 200, {"Content-Type": wire.MSGPACK_MEDIA_TYPE}, body


def event(
    request: GenerateRequest, prompt: int, teacher: TeacherIdentity = IDENTITY
) -> GenerateEvent:
    """Return the completion of a prompt: its first token, then the end."""
    done = Completion(
        token_ids=np.array([request.prompts[prompt][0], 1], np.uint32),
        finish_reason="stop",
        scores=None if request.top_k is None else scores(2, request.top_k),
    )
    return GenerateEvent(prompt=prompt, sample=0, completion=done, teacher=teacher)


def end(teacher: TeacherIdentity = IDENTITY, **more: Any) -> GenerateEnd:
    return GenerateEnd(teacher=teacher, request_id="r", **more)


def streamed(messages: Iterable[GenerateEvent | GenerateEnd]) -> Answer:
    media_type = wire.MSGPACK_STREAM_MEDIA_TYPE
    pieces = (wire.dump(message, media_type) for message in messages)
    return 200, {"Content-Type": media_type}, pieces


def problem(status: int, detail: str, **headers: str) -> Answer:
    body = b'{"type":"x","title":"t","status":%d,"detail":"%s","request_id":"r"}'
    return status, {"Content-Type": "application/problem+json", **headers}, (
        body % (status, detail.encode())
    )  # fmt: skip


class BrokenError(Exception):
    """An error that a body's maker raises to break the connection in the middle of the answer."""


@dataclass
class StubTeacher:
    """A teacher whose POST routes answer by ``script``, an entry a call, and rightly after that."""

    info: InfoResponse = field(default_factory=info)
    script: list[Callable[[Any], Answer]] = field(default_factory=list)
    requests: list[Any] = field(default_factory=list)
    not_ready: int = 0  # number of calls of /ready that are answered 503
    ready_calls: int = 0
    key: str | None = None
    url: str = ""

    def get(self, path: str) -> Answer:
        if path == "/ready":
            self.ready_calls += 1
        if path == "/ready" and self.not_ready:
            self.not_ready -= 1
            return problem(503, "loading")
        if path == "/v1/info":
            return packed(self.info)
        return (200, {}, b"{}") if path in ("/ready", "/health") else problem(404, "no such route")

    def post(self, path: str, body: bytes) -> Answer:
        kind: Any = ScoreRequest if path == "/v1/score" else GenerateRequest
        request = wire.load(kind, body, wire.MSGPACK_MEDIA_TYPE, max_bytes=1 << 26)
        self.requests.append(request)
        if self.script:
            return self.script.pop(0)(request)
        if isinstance(request, ScoreRequest):
            return packed(score_response(request, self.info.teacher))
        teacher = self.info.teacher
        events = [event(request, prompt, teacher) for prompt in range(len(request.prompts))]
        return streamed([*events, end(teacher)])

    @contextlib.contextmanager
    def serving(self, port: int = 0) -> Iterator[StubTeacher]:
        with serving(self, port, self.key) as self.url:
            yield self


class Answers(Protocol):
    """The interface of a server that `serving` puts on a socket."""

    def get(self, path: str) -> Answer: ...

    def post(self, path: str, body: bytes) -> Answer: ...


@contextlib.contextmanager
def serving(
    stub: Answers, port: int = 0, key: str | None = None, host: str = "127.0.0.1"
) -> Iterator[str]:
    """Yield the stub's URL, at ``port`` or a free one.

    Requests without the ``key`` to a route below /v1 are refused as vLLM refuses them. At the end
    open connections break, as when a process is killed.

    """
    connections: list[socket.socket] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        # Head and body are two packets, and Nagle holds the second for 40 ms.
        disable_nagle_algorithm = True

        def setup(self) -> None:
            super().setup()
            connections.append(self.connection)

        def do_GET(self) -> None:
            self._answer(self._refused() or stub.get(self.path))

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            with contextlib.suppress(OSError):  # the client did not wait
                self._answer(self._refused() or stub.post(self.path, body))

        def _refused(self) -> Answer | None:
            sent = self.headers["Authorization"]
            if key is None or not self.path.startswith("/v1") or sent == f"Bearer {key}":
                return None
            return 401, {"Content-Type": "application/json"}, b'{"error":"Unauthorized"}'

        def _answer(self, answer: Answer) -> None:
            status, headers, body = answer
            length = ("Transfer-Encoding", "chunked")
            if isinstance(body, bytes):
                length = ("Content-Length", str(len(body)))
            self.send_response(status)
            for name, value in dict([length, *headers.items()]).items():
                self.send_header(name, value)
            self.end_headers()
            if isinstance(body, bytes):
                self.wfile.write(body)
                return
            try:
                for piece in body:
                    self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
                self.wfile.write(b"0\r\n\r\n")
            except BrokenError:
                self.close_connection = True

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer((host, port), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://{host}:{server.server_address[1]}"
    finally:
        server.shutdown()
        for connection in connections:
            with contextlib.suppress(OSError):  # closed already
                connection.shutdown(socket.SHUT_RDWR)
        server.socket.close()

"""A stand-in for vLLM's own server as a rollout server: its routes, without a model."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

GENERATE = "/inference/v1/generate"


class StubRolloutServer:
    """Answers as vLLM does; a test changes what it says, and reads what it was told.

    Attributes:
        calls: (path, body) of each POST but those to `GENERATE`, in their order.
        prompts: bodies of requests to `GENERATE`, without probes.
        version: name of its weights.
        context: longest sequence in tokens.
        key: the key that its guarded routes want; None for any.
        answers: status and body of a path, in place of its own.
        choice: fields of each completion, in place of its own.
        busy: the most requests to `GENERATE` that were there at once.
        gate: requests to `GENERATE` wait for it.
        before: called with each path before it is answered.
    """

    def __init__(self) -> None:
        self.calls, self.prompts = [], []
        self.version, self.context, self.key, self.paused = "default", 64, None, False
        self.answers, self.choice = {}, {}
        self.busy = self._now = 0
        self.gate = threading.Event()
        self.gate.set()
        self.before: Callable[[str], None] = lambda path: None
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    @property
    def paths(self) -> list[str]:
        """The paths of `calls`, without a query."""
        return [path.partition("?")[0].strip("/") for path, _ in self.calls]

    def die(self) -> None:
        """Stop answering."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()

    def reply(self, path: str, body, key) -> tuple[int, object]:
        """Return status and content of an answer."""
        self.before(path)
        if path in self.answers:
            return self.answers[path]
        guarded = path.startswith(("/v1", "/inference"))
        if guarded and self.key is not None and key != f"Bearer {self.key}":
            return 401, {"error": "Unauthorized"}
        if path == "/v1/models":
            return 200, {"data": [{"max_model_len": self.context}]}
        if path == "/weight_info":
            return 200, {"weight_version": self.version}
        if path == "/is_paused":
            return 200, {"is_paused": self.paused}
        if path == "/get_world_size":
            return 200, {"world_size": 2}
        if path == GENERATE:
            return 200, {"choices": [self._complete(body)]}
        if path.startswith("/pause"):
            self.paused = True
        if path == "/resume":
            self.paused = False
        if path == "/finish_weight_update" and body:
            self.version = body["weight_version"]
        return 200, {}

    def _complete(self, body) -> dict:
        params = body["sampling_params"]
        probe = params.get("logprobs") == 0
        if not probe:
            with self._lock:
                self.prompts.append(body)
                self._now += 1
                self.busy = max(self.busy, self._now)
            self.gate.wait(30)
            with self._lock:
                self._now -= 1
        ids = [sum(body["token_ids"]) % 50, *[7] * (params["max_tokens"] - 1)]
        return {
            "token_ids": ids,
            "finish_reason": "length",
            "weight_versions": [{"version": self.version}],
            "logprobs": _logprobs(ids, params.get("logprobs")),
            **({} if probe else self.choice),
        }

    def _handler(self):
        stub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                self._answer(None)

            def do_POST(self):
                data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                body = json.loads(data) if data else None
                if self.path != GENERATE:
                    stub.calls.append((self.path, body))
                self._answer(body)

            def _answer(self, body):
                status, content = stub.reply(self.path, body, self.headers.get("Authorization"))
                data = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *arguments):
                pass

        return Handler


def _logprobs(ids: list[int], count: int | None) -> dict | None:
    """Candidates 0, 1, … of falling log-prob at each position, after the sampled token."""
    if count is None:
        return None
    others = [{"token_id": place, "logprob": -1.0 - place} for place in range(count - 1)]
    return {
        "content": [
            {"logprob": 0.0, "top_logprobs": [{"token_id": id, "logprob": -9.0}, *others]}
            for id in ids
        ]
    }


@contextmanager
def stub_rollout_servers(count: int):
    """Yield servers, which end with the block."""
    stubs = [StubRolloutServer() for _ in range(count)]
    try:
        yield stubs
    finally:
        for stub in stubs:
            stub.gate.set()
            stub.die()

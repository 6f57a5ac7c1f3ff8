"""A stand-in for vLLM's own server as a rollout server: its routes, without a model."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch

from shared.vllm_adapters import ReceivedAdapters
from student_trainer.rollouts import drift, servers

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
        lora_rank: rank up to which it loads adapters; None if it loads none.
        adapters: {name: folder} of those that are loaded.
        unused: modules that its model has not.
        tokens: what it has written, as it tells.
        busy: the most requests to `GENERATE` that were there at once.
        gate: requests to `GENERATE` wait for it.
        before: called with each path before it is answered.
    """

    def __init__(self) -> None:
        self.calls, self.prompts = [], []
        self.version, self.context, self.key, self.paused = "default", 64, None, False
        self.answers, self.choice = {}, {}
        self.lora_rank, self.adapters, self.unused, self.tokens = None, {}, [], 0
        self._worker = ReceivedAdapters()
        self.busy = self._now = 0
        self.gate = threading.Event()
        self.gate.set()
        self.before: Callable[[str], None] = lambda path: None
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self._server.handle_error = lambda request, address: None  # of a client that has gone
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
        if path == "/metrics":
            return 200, f'vllm:generation_tokens_total{{engine="0"}} {self.tokens}\n'.encode()
        if path.startswith("/server_info"):
            return 200, self._info()
        if path == "/collective_rpc":
            return 200, {"results": [self._call(body["method"], body.get("kwargs", {}))] * 2}
        if path == "/v1/load_lora_adapter":
            if body["lora_name"] in self.adapters:
                return 400, {"error": "has already been loaded"}
            self.adapters[body["lora_name"]] = body["lora_path"]
        if path == "/v1/unload_lora_adapter":
            known = self.adapters.pop(body["lora_name"], None)
            return (200 if known else 404), {}
        if path == "/update_weight_version":
            self.version = body["new_version"]
        if path == GENERATE and body.get("model") not in (None, *self.adapters):
            return 404, {"error": "does not exist"}
        if path == GENERATE:
            return 200, {"choices": [self._complete(body)]}
        if path.startswith("/pause"):
            self.paused = True
        if path == "/resume":
            self.paused = False
        if path == "/finish_weight_update" and body:
            self.version = body["weight_version"]
        return 200, {}

    def _info(self) -> dict:
        lora = None if self.lora_rank is None else {"max_lora_rank": self.lora_rank}
        extension = "shared.vllm_adapters.ReceivedAdapters"
        return {
            "vllm_config": {
                "lora_config": lora, "parallel_config": {"worker_extension_cls": extension}
            },
            "vllm_env": {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": lora is not None},
        }  # fmt: skip

    def _call(self, method: str, arguments: dict) -> object:
        if method == "unused_adapter_modules":
            return self.unused
        return getattr(self._worker, method)(**arguments)

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


class ControlOnly:
    """A transfer that drives the servers as vLLM's engines do, and sends nothing."""

    def __init__(self, control):
        self.control = control
        control.init_weight_transfer_engine({"rank_offset": 1})

    def send(self):
        self.control.start_weight_update()
        self.control.update_weights({"names": []})
        self.control.finish_weight_update()

    def close(self):
        pass


def send_no_weights(monkeypatch) -> None:
    """Let a trainer drive the servers as in a transfer of weights, but send none and probe none."""
    monkeypatch.setattr(
        servers, "open_transfer", lambda backend, weights, control, seconds: ControlOnly(control)
    )
    monkeypatch.setattr(
        drift, "trainer_logprobs", lambda model, ids: torch.zeros(len(ids), model.vocab_size)
    )

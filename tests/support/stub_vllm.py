"""A `vllm serve` without a model on a real socket: the same answers, the same refusals."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tests.support.stub import Answer, serving


def as_json(value: Any, status: int = 200) -> Answer:
    return status, {"Content-Type": "application/json"}, json.dumps(value).encode()


def refusal(message: str, param: str) -> Answer:
    error = {"message": message, "type": "BadRequestError", "param": param, "code": 400}
    return as_json({"error": error}, 400)


@dataclass
class StubVllm:
    """A stub that answers completions by ``script``, an entry a call, and rightly after that.

    Every row's distribution is ``probabilities``, over the whole vocabulary.
    """

    tokenizer: Any
    probabilities: np.ndarray[Any, Any]
    model: str = "stub"
    version: str = "0.32.0"
    max_logprobs: int = 20
    max_model_len: int = 64
    script: list[Callable[[dict[str, Any]], Answer]] = field(default_factory=list)
    requests: list[dict[str, Any]] = field(default_factory=list)
    key: str | None = None
    url: str = ""

    def get(self, path: str) -> Answer:
        if path == "/health":
            return 200, {}, b""
        if path == "/version":
            return as_json({"version": self.version})
        card = {"id": self.model, "parent": None, "max_model_len": self.max_model_len}
        adapter = {"id": "adapter", "parent": self.model, "max_model_len": None}
        return as_json({"object": "list", "data": [adapter, card]})

    def post(self, path: str, body: bytes) -> Answer:
        request = json.loads(body)
        if path == "/tokenize":
            ids = self.tokenizer(request["prompt"], add_special_tokens=False)["input_ids"]
            return as_json({"tokens": ids, "count": len(ids)})
        largest = max(max(prompt) for prompt in request["prompt"])
        if largest >= len(self.probabilities):
            return refusal(f"Token id {largest} is out of vocabulary", "prompt")
        if (request.get("prompt_logprobs") or 0) > self.max_logprobs:
            return refusal(
                f"Requested prompt logprobs of {request['prompt_logprobs']}, which is greater than "
                f"max allowed: {self.max_logprobs}", "prompt_logprobs",
            )  # fmt: skip
        self.requests.append(request)
        if self.script:
            return self.script.pop(0)(request)
        return as_json(self.completions(request))

    def completions(self, request: dict[str, Any]) -> dict[str, Any]:
        choices = []
        for index, prompt in enumerate(request["prompt"]):
            choice = {"index": index, "text": "", "finish_reason": "stop", "token_ids": [5, 1]}
            if request.get("prompt_logprobs"):
                rows = [self.row(token_id, request["prompt_logprobs"]) for token_id in prompt[1:]]
                choice["prompt_logprobs"] = [None, *rows]
            choices.append(choice)
        return {"model": request["model"], "choices": choices[::-1]}

    def row(self, token_id: int, k: int) -> dict[str, dict[str, Any]]:
        """Return the prompt's token and then the top-k, as vLLM writes them; −9999 is −inf."""
        order = np.argsort(-self.probabilities, kind="stable").tolist()
        with np.errstate(divide="ignore"):
            logprobs = np.maximum(np.log(self.probabilities), -9999.0)
        return {
            str(i): {"logprob": float(np.float32(logprobs[i])), "rank": order.index(i) + 1}
            for i in dict.fromkeys([token_id, *order[:k]])
        }

    @contextlib.contextmanager
    def serving(self, port: int = 0) -> Iterator[StubVllm]:
        with serving(self, port, self.key) as self.url:
            yield self

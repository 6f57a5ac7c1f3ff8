"""The table of routes: a route is added here, and nowhere else."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Literal

from shared.protocol import (
    GenerateEnd,
    GenerateEvent,
    GenerateRequest,
    GenerateResponse,
    InfoResponse,
    ScoreRequest,
    ScoreResponse,
)
from teacher_server.http.exchange import Exchange
from teacher_server.http.replies import Answer, Refusal, openai_error_reply, problem_reply
from teacher_server.http.schema import Bodies
from teacher_server.openai.schema import ChatRequest, CompletionRequest
from teacher_server.routes import generate, info, openai, score
from teacher_server.service import Service


@dataclass(frozen=True)
class Route:
    """A route of the server.

    Attributes:
        method, path: of its requests.
        handler: makes the answer; its docstring's first line is the summary in the documentation.
        bodies: the messages, for the documentation.
        refusal: makes an answer of an error.
        needs_key: False for routes that a load balancer calls without a key.
        log_level: of the line about each request, if there is one; DEBUG for routes that are called
            every few seconds.
    """

    method: Literal["GET", "POST"]
    path: str
    handler: Callable[[Service, Exchange], Awaitable[Answer]]
    bodies: Bodies = Bodies()
    refusal: Refusal = problem_reply
    needs_key: bool = True
    log_level: int = logging.INFO

    @property
    def summary(self) -> str:
        return (self.handler.__doc__ or "").split("\n")[0]


ROUTES = (
    Route("POST", "/v1/score", score.score, Bodies(ScoreRequest, ScoreResponse)),
    Route(
        "POST", "/v1/generate", generate.generate,
        Bodies(GenerateRequest, GenerateResponse, (GenerateEvent, GenerateEnd)),
    ),
    Route("GET", "/v1/info", info.info, Bodies(answer=InfoResponse)),
    Route("GET", "/health", info.health, needs_key=False, log_level=logging.DEBUG),
    Route("GET", "/ready", info.ready, needs_key=False, log_level=logging.DEBUG),
    Route("GET", "/metrics", info.metrics, log_level=logging.DEBUG),
    Route("GET", "/v1/models", openai.models, refusal=openai_error_reply),
    Route("GET", "/v1/models/{name:path}", openai.model, refusal=openai_error_reply),
    Route(
        "POST", "/v1/completions", openai.completions, Bodies(CompletionRequest),
        refusal=openai_error_reply,
    ),
    Route(
        "POST", "/v1/chat/completions", openai.chat, Bodies(ChatRequest),
        refusal=openai_error_reply,
    ),
)  # fmt: skip

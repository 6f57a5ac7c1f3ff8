"""The routes `/v1/models`, `/v1/completions` and `/v1/chat/completions` for OpenAI's clients."""

from __future__ import annotations

from dataclasses import dataclass

from shared import wire
from shared.protocol import InfoResponse
from shared.validation import check_model
from teacher_server.backends.base import GenerateJob, ScoreJob
from teacher_server.http.body import Body, read_body
from teacher_server.http.exchange import Exchange
from teacher_server.http.replies import Answer, Reply, json_reply
from teacher_server.jobs import (
    Job,
    Keyed,
    adapter_of,
    generate_jobs,
    score_jobs,
    total_answer_bytes,
    total_tokens,
)
from teacher_server.openai.adapter import OpenAIAdapter
from teacher_server.openai.answers import model_card
from teacher_server.openai.plan import OpenAIPlan
from teacher_server.openai.schema import ChatRequest, CompletionRequest
from teacher_server.service import Service, both

# Bytes in memory for each byte of the arrays that an answer is made from.
_COPIES = 40
# Tokenizing a text takes about this many times as long as reading it.
_TOKENIZED = 8


@dataclass(frozen=True)
class _Work:
    """A request as jobs: ``score`` for its prompts, ``generate`` for its completions."""

    plan: OpenAIPlan
    score: list[Keyed[ScoreJob]]
    generate: list[Keyed[GenerateJob]]

    @property
    def jobs(self) -> list[Keyed[Job]]:
        return [*self.score, *self.generate]


async def models(service: Service, exchange: Exchange) -> Answer:
    """Return an OpenAI-style list of the base model and its adapters."""
    _, info = service.loaded()
    cards = [model_card(one, info) for one in info.models]
    return json_reply({"object": "list", "data": cards})


async def model(service: Service, exchange: Exchange) -> Answer:
    """Return an OpenAI-style description of one model."""
    _, info = service.loaded()
    served = check_model(exchange.request.path_params["name"], info)
    return json_reply(model_card(served, info))


async def completions(service: Service, exchange: Exchange) -> Answer:
    """Return OpenAI-style completions, with vLLM's prompt_logprobs."""
    return await _answer(service, exchange, CompletionRequest)


async def chat(service: Service, exchange: Exchange) -> Answer:
    """Return OpenAI-style chat completions."""
    return await _answer(service, exchange, ChatRequest)


async def _answer(
    service: Service,
    exchange: Exchange,
    message: type[CompletionRequest] | type[ChatRequest],
) -> Answer:
    """Return completions in OpenAI's form; ``message`` is the type of the request."""
    backend, info = service.loaded()
    body = await read_body(exchange, info.limits.max_body_bytes, (wire.JSON_MEDIA_TYPE,))
    work = await exchange.in_pool(
        len(body.data) * _TOKENIZED, _check, service.openai, message, body, info, exchange.client
    )
    size = total_answer_bytes(work.jobs) * _COPIES
    exchange.hold(size)
    with exchange.admit(total_tokens(work.jobs), len(work.jobs)):
        n = work.plan.request.n or 1
        scored, written = await exchange.run(
            both(
                service.score(backend, work.score, "prompt"),
                service.generate(backend, work.generate, "prompt", n),
            )
        )
        service.count_scored(work.score)
        service.count_generated(work.generate, written)
        answer = await exchange.in_pool(
            size, service.openai.answer, work.plan, scored, written, info, exchange.request_id
        )
        return Reply(memoryview(answer), media_type=wire.JSON_MEDIA_TYPE)


def _check(
    adapter: OpenAIAdapter,
    message: type[CompletionRequest] | type[ChatRequest],
    body: Body,
    info: InfoResponse,
    client: str,
) -> _Work:
    """Return the jobs of a request, once it is parsed, tokenized and checked."""
    plan = adapter.plan(body.load(message), info)
    lora = adapter_of(plan.request.model, info)
    generate = plan.generate
    return _Work(
        plan,
        score=[] if plan.score is None else score_jobs(plan.score, client, lora),
        generate=[] if generate is None else generate_jobs(generate, client, plan.stop, lora),
    )

"""The route `POST /v1/score`: the sparse log-probs of token sequences."""

from __future__ import annotations

from shared.protocol import InfoResponse, ScoreRequest, ScoreResponse
from shared.validation import check_model, check_score_request
from teacher_server.backends.base import ScoreJob
from teacher_server.http.body import Body, read_body
from teacher_server.http.exchange import Exchange
from teacher_server.http.replies import Answer, hold_answer, message_reply
from teacher_server.jobs import Keyed, adapter_of, score_jobs, total_answer_bytes, total_tokens
from teacher_server.service import Service


async def score(service: Service, exchange: Exchange) -> Answer:
    """Return the sparse log-probs of token sequences."""
    backend, info = service.loaded()
    body = await read_body(exchange, info.limits.max_body_bytes)
    request, jobs = await exchange.in_pool(len(body.data), _check, body, info, exchange.client)
    hold_answer(exchange, total_answer_bytes(jobs), "sequences")
    with exchange.admit(total_tokens(jobs), len(jobs)):
        scored = await exchange.run(service.score(backend, jobs, "sequences"))
        service.count_scored(jobs)
        answer = ScoreResponse.model_construct(
            sequences=scored,
            teacher=check_model(request.model, info),
            request_id=exchange.request_id,
        )
        return await message_reply(exchange, answer)


def _check(
    body: Body, info: InfoResponse, client: str
) -> tuple[ScoreRequest, list[Keyed[ScoreJob]]]:
    """Return a request and its jobs, once it is parsed and checked."""
    request = body.load(ScoreRequest)
    check_score_request(request, info)
    return request, score_jobs(request, client, adapter_of(request.model, info))

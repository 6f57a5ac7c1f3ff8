"""The route `POST /v1/generate`: completions of prompts, at once or each when it is finished."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence

from shared import wire
from shared.protocol import (
    GenerateEnd,
    GenerateEvent,
    GenerateRequest,
    GenerateResponse,
    InfoResponse,
    TeacherIdentity,
)
from shared.validation import check_generate_request, check_model
from teacher_server.backends.base import Backend, GenerateJob
from teacher_server.http.body import Body, read_body
from teacher_server.http.exchange import Exchange
from teacher_server.http.replies import (
    CLIENT_GONE,
    Answer,
    Stream,
    as_protocol_error,
    hold_answer,
    message_reply,
    problem_of,
)
from teacher_server.jobs import Keyed, adapter_of, generate_jobs, total_answer_bytes, total_tokens
from teacher_server.limits.admission import ClientGoneError
from teacher_server.service import Service, in_order


async def generate(service: Service, exchange: Exchange) -> Answer:
    """Return completions of prompts, with sparse log-probs when requested."""
    backend, info = service.loaded()
    body = await read_body(exchange, info.limits.max_body_bytes)
    request, jobs = await exchange.in_pool(len(body.data), _check, body, info, exchange.client)
    hold_answer(exchange, total_answer_bytes(jobs), "prompts")
    teacher = check_model(request.model, info)
    if request.stream:
        return await _stream(service, exchange, teacher, jobs, request.n)
    with exchange.admit(total_tokens(jobs), len(jobs)):
        flat = await exchange.run(service.generate(backend, jobs, "prompts", request.n))
        service.count_generated(jobs, flat)
        answer = GenerateResponse.model_construct(
            completions=[flat[i : i + request.n] for i in range(0, len(flat), request.n)],
            teacher=teacher,
            request_id=exchange.request_id,
        )
        return await message_reply(exchange, answer)


def _check(
    body: Body, info: InfoResponse, client: str
) -> tuple[GenerateRequest, list[Keyed[GenerateJob]]]:
    """Return a request and its jobs, once it is parsed and checked."""
    request = body.load(GenerateRequest)
    check_generate_request(request, info)
    return request, generate_jobs(request, client, adapter=adapter_of(request.model, info))


async def _stream(
    service: Service,
    exchange: Exchange,
    teacher: TeacherIdentity,
    jobs: Sequence[Keyed[GenerateJob]],
    n: int,
) -> Stream:
    """Return a stream of the completions, each sent when it is finished.

    It begins with the first one, so an error before that is an ordinary refusal.
    """
    backend, _ = service.loaded()
    media_type = wire.STREAM_MEDIA_TYPES[exchange.answer_type()]
    finished = _as_they_finish(service, exchange, backend, teacher, jobs, n)
    first = await anext(finished)
    size = max(one.job.answer_bytes for one in jobs)

    async def packed(event: GenerateEvent) -> bytes:
        # `exchange.run` ends the jobs when the caller leaves, so this need not watch for it.
        return await exchange.pool.run(exchange.client, size, wire.dump, event, media_type)

    async def items() -> AsyncGenerator[bytes, None]:
        problem = None
        try:
            yield await packed(first)
            async for event in finished:
                yield await packed(event)
        except ClientGoneError:
            stream.outcome = CLIENT_GONE
            return
        except Exception as error:
            refusal = as_protocol_error(error, exchange.request_id, service.metrics)
            stream.outcome = refusal.status
            problem = problem_of(refusal, exchange.request_id)
        finally:
            await finished.aclose()
        end = GenerateEnd(teacher=teacher, request_id=exchange.request_id, problem=problem)
        yield wire.dump(end, media_type)

    stream = Stream(items(), media_type)
    return stream


async def _as_they_finish(
    service: Service,
    exchange: Exchange,
    backend: Backend,
    teacher: TeacherIdentity,
    jobs: Sequence[Keyed[GenerateJob]],
    n: int,
) -> AsyncGenerator[GenerateEvent, None]:
    """Yield completions in the order they finish; then raise the error that stopped the others.

    A slow reader delays neither the work nor the freeing of its place in the queue.
    """
    finished: asyncio.Queue[GenerateEvent | None] = asyncio.Queue()

    async def finish(index: int, one: Keyed[GenerateJob]) -> None:
        completion = await service.generate_one(backend, one)
        service.count_generated([one], [completion])
        finished.put_nowait(
            GenerateEvent.model_construct(
                prompt=index // n,
                sample=index % n,
                completion=completion,
                teacher=teacher,
            )
        )

    async def finish_all() -> None:
        with exchange.admit(total_tokens(jobs), len(jobs)):
            work = [finish(index, one) for index, one in enumerate(jobs)]
            await exchange.run(in_order(work, "prompts", n))

    task = asyncio.ensure_future(finish_all())
    task.add_done_callback(lambda _: finished.put_nowait(None))
    try:
        while (event := await finished.get()) is not None:
            yield event
        await task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

"""The routes `/v1/info`, `/health`, `/ready` and `/metrics`: the server's identity and state."""

from __future__ import annotations

from prometheus_client import CONTENT_TYPE_LATEST

from shared import wire
from teacher_server.http.exchange import Exchange
from teacher_server.http.replies import Answer, Reply, message_reply
from teacher_server.service import Service


async def info(service: Service, exchange: Exchange) -> Answer:
    """Return the teacher's identity, its limits and its capabilities."""
    _, described = service.loaded()
    return await message_reply(exchange, described)


async def health(service: Service, exchange: Exchange) -> Answer:
    """Return 200 while the process answers, and 503 when its engine has died: restart it."""
    service.check_alive()
    return Reply('{"status":"ok"}', media_type=wire.JSON_MEDIA_TYPE)


async def ready(service: Service, exchange: Exchange) -> Answer:
    """Return 200 when requests are taken, and 503 while loading, draining, or without an engine."""
    service.loaded()
    return Reply('{"status":"ready"}', media_type=wire.JSON_MEDIA_TYPE)


async def metrics(service: Service, exchange: Exchange) -> Answer:
    """Return Prometheus metrics."""
    return Reply(service.metrics.exposition(), media_type=CONTENT_TYPE_LATEST)

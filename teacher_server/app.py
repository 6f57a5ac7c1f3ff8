"""The application: its state, and its routes put together."""

from __future__ import annotations

import os
from functools import partial

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse

from shared import __version__
from shared.errors import UnavailableError
from shared.protocol import PROTOCOL_VERSION, InfoResponse, Limits
from teacher_server.backends.base import Backend
from teacher_server.http import docs_page, schema
from teacher_server.http.endpoint import EndpointWrapper
from teacher_server.limits.admission import Admission
from teacher_server.limits.auth import ApiKeys
from teacher_server.limits.pool import FairPool
from teacher_server.limits.single_flight import SingleFlight
from teacher_server.metrics import Metrics, State
from teacher_server.openai.adapter import OpenAIAdapter
from teacher_server.routes.table import ROUTES
from teacher_server.service import Service
from teacher_server.settings import Settings
from teacher_server.throughput import Throughput


class TeacherApp:
    """The application and its state: no backend while the model loads."""

    def __init__(self, settings: Settings, metrics: Metrics, keys: ApiKeys) -> None:
        self.settings = settings
        self.metrics = metrics
        self.throughput = Throughput(metrics)
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
                "model": settings.name,
            }
        )

    @property
    def state(self) -> State:
        """The state of the server; requests are taken when it is "ready"."""
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
            models=[facts.teacher, *facts.adapters],
        )
        self.backend = backend

    def loaded(self) -> tuple[Backend, InfoResponse]:
        """Return the backend, and the answer of `/v1/info`.

        Raises:
            UnavailableError: the server is draining, the model loads, or the engine has died.
        """
        if self.admission.draining:
            raise UnavailableError("the server is shutting down", retry_after=1.0)
        if self.backend is None or self.info is None:
            raise UnavailableError("the model is loading", retry_after=1.0)
        self.check_alive()
        return self.backend, self.info

    def check_alive(self) -> None:
        """Raise `UnavailableError` when the engine has died; while the model loads, pass."""
        if self.backend is not None and not self.backend.alive:
            raise UnavailableError("the engine is dead; restart the server")

    def _build(self) -> FastAPI:
        api = FastAPI(
            title="sparse-gkd teacher server", version=__version__, redirect_slashes=False,
            docs_url=None, redoc_url=None,  # their pages load programs from another host
        )  # fmt: skip
        api.add_api_route("/docs", _docs, include_in_schema=False)
        service = Service(self.loaded, self.check_alive, self.in_flight, self.metrics, self.openai)
        # Keys are looked up at each request, since they can be replaced.
        wrapper = EndpointWrapper(
            lambda sent: self.keys.check(sent), self.admission, self.pool, self.metrics,
            self.throughput, self.settings.log_requests,
        )  # fmt: skip
        for route in ROUTES:
            endpoint = wrapper.wrap(
                route.path, partial(route.handler, service), refusal=route.refusal,
                needs_key=route.needs_key, log_level=route.log_level,
            )  # fmt: skip
            api.add_api_route(
                route.path, endpoint, methods=[route.method], response_model=None,
                summary=route.summary, openapi_extra=schema.operation(route.bodies),
            )  # fmt: skip
        api.add_exception_handler(HTTPException, wrapper.unknown_route)
        description = schema.describe(api, [route.bodies for route in ROUTES])
        api.openapi = lambda: description  # type: ignore[method-assign]
        return api


async def _docs() -> HTMLResponse:
    return HTMLResponse(docs_page.PAGE, headers={"Content-Security-Policy": docs_page.POLICY})

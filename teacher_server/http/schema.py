"""The OpenAPI description: bodies of each route in both media types, and their structures."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from shared import wire
from shared.protocol import Problem
from teacher_server.http.exchange import MEDIA_TYPES

_REF = "#/components/schemas/"


@dataclass(frozen=True)
class Bodies:
    """The structures that a route takes and gives.

    Attributes:
        request: None where there is no body.
        answer: None where the answer is plain JSON without a structure here, as OpenAI's are; then
            the request is JSON alone.
        items: of a streamed answer.
    """

    request: type[BaseModel] | None = None
    answer: type[BaseModel] | None = None
    items: tuple[type[BaseModel], ...] = ()


def operation(bodies: Bodies) -> dict[str, Any]:
    """Return the part of a route's OpenAPI entry that describes its bodies."""
    entry: dict[str, Any] = {}
    if bodies.answer is not None:
        problem = {"application/problem+json": {"schema": _ref(Problem)}}
        answers = _content(bodies.answer, MEDIA_TYPES[::-1])
        if bodies.items:
            items = {"schema": {"oneOf": [_ref(item) for item in bodies.items]}}
            answers |= dict.fromkeys(wire.STREAM_MEDIA_TYPES.values(), items)
        entry["responses"] = {
            "200": {"description": "The answer", "content": answers},
            "default": {"description": "Problem document (RFC 9457)", "content": problem},
        }
    if bodies.request is not None:
        types = (wire.JSON_MEDIA_TYPE,) if bodies.answer is None else MEDIA_TYPES[::-1]
        entry["requestBody"] = {"required": True, "content": _content(bodies.request, types)}
    return entry


def describe(api: FastAPI, bodies: Iterable[Bodies]) -> dict[str, Any]:
    """Return the OpenAPI document of an application whose routes have these bodies."""
    schema = get_openapi(title=api.title, version=api.version, routes=api.routes)
    models: list[type[BaseModel]] = [Problem]
    for one in bodies:
        models += [model for model in (one.request, one.answer, *one.items) if model is not None]
    _, definitions = models_json_schema(
        [(model, "validation") for model in models], ref_template=f"{_REF}{{model}}"
    )
    bearer = {"type": "http", "scheme": "bearer"}
    schema["components"] = {
        "schemas": definitions["$defs"], "securitySchemes": {"bearer": bearer},
    }  # fmt: skip
    schema["security"] = [{"bearer": []}, {}]  # {}: a server without keys
    return schema


def _ref(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": f"{_REF}{model.__name__}"}


def _content(model: type[BaseModel], media_types: Iterable[str]) -> dict[str, Any]:
    return {media_type: {"schema": _ref(model)} for media_type in media_types}

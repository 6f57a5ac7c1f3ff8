"""The page of the HTTP interface, from the server's OpenAPI description."""

from __future__ import annotations

import inspect
import json
import re
from typing import Any

from markdown_text import escaped

from teacher_server.app import TeacherApp
from teacher_server.limits.auth import ApiKeys
from teacher_server.metrics import Metrics
from teacher_server.settings import Settings

Schema = dict[str, Any]

_BOUNDS = {
    "minimum": "≥",
    "exclusiveMinimum": "&gt;",
    "maximum": "≤",
    "exclusiveMaximum": "&lt;",
    "minItems": "items ≥",
    "maxItems": "items ≤",
    "maxLength": "length ≤",
}


def page() -> str:
    """Return the page: every route, then every structure."""
    # The description needs no loaded model.
    described = TeacherApp(Settings("org/name"), Metrics(), ApiKeys([])).api.openapi()
    lines = [
        "# HTTP",
        "",
        "From the server's own OpenAPI description, which it serves as `/openapi.json`. A server "
        "with keys wants `Authorization: Bearer KEY`. Structures travel as `application/msgpack`, "
        "arrays being raw little-endian buffers, or as `application/json`, arrays being lists.",
    ]
    for path, operations in described["paths"].items():
        for method, operation in operations.items():
            lines += _route(f"{method.upper()} {path}", operation)
    lines += ["", "## Structures"]
    for name, schema in described["components"]["schemas"].items():
        lines += _structure(name, schema)
    return "\n".join(lines) + "\n"


def _route(title: str, operation: Schema) -> list[str]:
    lines = ["", f"## `{title}`", "", escaped(operation["summary"])]
    if "requestBody" in operation:
        lines += ["", f"Request: {_content(operation['requestBody'])}."]
    for status, response in operation["responses"].items():
        if any(content.get("schema") for content in response.get("content", {}).values()):
            what = "Errors" if status == "default" else f"Answer ({status})"
            lines += ["", f"{what}: {_content(response)}."]
    return lines


def _content(body: Schema) -> str:
    """Return the media types of a body by the structure that they carry."""
    by_type: dict[str, list[str]] = {}
    for media_type, content in body["content"].items():
        by_type.setdefault(_type(content["schema"]), []).append(f"`{media_type}`")
    return "; ".join(f"{kind} as {' or '.join(types)}" for kind, types in by_type.items())


def _structure(name: str, schema: Schema) -> list[str]:
    lines = ["", f"### {name}"]
    about, attributes = _documented(schema.get("description", ""))
    if about:
        lines += ["", escaped(about)]
    required = schema.get("required", ())
    lines += ["", "| field | type | |", "| --- | --- | --- |"]
    for field, of_field in schema.get("properties", {}).items():
        text = attributes.get(field, "")
        if field not in required and of_field.get("default") is not None:
            text = f"{text} Default: `{of_field['default']}`.".strip()
        must = "" if field not in required else ", required"
        lines.append(f"| `{field}` | {_type(of_field)}{must} | {escaped(text)} |")
    return lines


def _documented(docstring: str) -> tuple[str, dict[str, str]]:
    """Return the text before ``Attributes:``, and the text of each attribute."""
    about, _, listed = inspect.cleandoc(docstring).partition("Attributes:\n")
    attributes: dict[str, str] = {}
    for entry in re.split(r"\n    (?=\S)", "\n" + listed.split("\n\n")[0])[1:]:
        names, _, text = entry.partition(":")
        for name in names.split(","):
            attributes[name.strip()] = " ".join(text.split())
    return about.strip(), attributes


def _type(schema: Schema) -> str:
    """Return a schema in a few words."""
    if "$ref" in schema:
        name = schema["$ref"].rsplit("/", 1)[1]
        return f"[{name}](#{name.lower()})"
    if alternatives := schema.get("anyOf", schema.get("oneOf")):
        return " or ".join(_type(alternative) for alternative in alternatives)
    if "enum" in schema:
        return " or ".join(f"`{json.dumps(value)}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{json.dumps(schema['const'])}`"
    bounds = [f"{sign} {schema[key]}" for key, sign in _BOUNDS.items() if key in schema]
    kinds = schema.get("type", "anything")
    name = " or ".join([kinds] if isinstance(kinds, str) else kinds)
    if "items" in schema:
        name += f" of {_type(schema['items'])}"
    return name + (f" ({', '.join(bounds)})" if bounds else "")

"""Helpers that call a teacher over a socket and read its metrics."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import httpx
from pydantic import BaseModel

from shared import wire

A = TypeVar("A", bound=BaseModel)

# The metric of generations whose caller disconnected before they were done.
LEFT = 'teacher_requests_total{route="/v1/generate",status="499"}'


def post(url: str, request: BaseModel, answer: type[A], media_type: str) -> A:
    """Return the answer of the route at ``url`` to ``request``."""
    response = httpx.post(
        url,
        content=wire.dump(request, media_type),
        headers={"content-type": media_type},
        timeout=60,
    )
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == media_type
    return wire.load(answer, response.content, media_type, max_bytes=1 << 28)


def metric(url: str, name: str) -> float:
    """Return the value of one line of ``/metrics``, or 0 if it is not there yet."""
    for line in httpx.get(f"{url}/metrics").text.splitlines():
        if line.startswith(name + " "):
            return float(line.rsplit(" ", 1)[1])
    return 0.0


def engine_metric(url: str, name: str, **labels: str) -> float:
    """Return the sum of vLLM's metric over all lines that carry ``labels``.

    Raises:
        AssertionError: no such line.
    """
    found = [
        float(line.rsplit(" ", 1)[1])
        for line in httpx.get(f"{url}/metrics").text.splitlines()
        if line.startswith(f"vllm:{name}{{")
        and all(f'{key}="{value}"' in line for key, value in labels.items())
    ]
    assert found, f"no line of vllm:{name} with {labels}"
    return sum(found)


def until(condition: Callable[[], bool], seconds: float = 120.0) -> None:
    """Wait until ``condition`` holds.

    Raises:
        AssertionError: it did not within ``seconds``.
    """
    since = time.monotonic()
    while not condition():
        assert time.monotonic() - since < seconds, f"not within {seconds} s"
        time.sleep(0.02)


def client_at(number: int) -> httpx.Client:
    """Return an HTTP client with an address of its own on this machine: 127.0.0.1 is number 1."""
    return httpx.Client(
        transport=httpx.HTTPTransport(local_address=f"127.0.0.{number}"), timeout=60
    )

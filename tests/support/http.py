"""Calls to a teacher over a socket, in either media type, and what they lead to."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import httpx
from pydantic import BaseModel

from shared import wire

A = TypeVar("A", bound=BaseModel)

# The metric of generations whose caller left before they were done.
LEFT = 'teacher_requests_total{route="/v1/generate",status="499"}'


def post(url: str, request: BaseModel, answer: type[A], media_type: str) -> A:
    """The answer to ``request``, which goes to the ``url`` of a route."""
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
    """Value of one line of ``/metrics``; 0 for a line that is not there yet."""
    for line in httpx.get(f"{url}/metrics").text.splitlines():
        if line.startswith(name + " "):
            return float(line.rsplit(" ", 1)[1])
    return 0.0


def engine_metric(url: str, name: str, **labels: str) -> float:
    """Sum of vLLM's metric over all lines that carry ``labels``; there must be one.

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


def until(condition: Callable[[], bool], seconds: float) -> None:
    """Wait until ``condition`` holds.

    Raises:
        AssertionError: it did not within ``seconds``.
    """
    since = time.monotonic()
    while not condition():
        assert time.monotonic() - since < seconds, f"not within {seconds} s"
        time.sleep(0.02)


def client_at(number: int) -> httpx.Client:
    """An HTTP client with an address of its own on this machine: 127.0.0.1 is number 1."""
    return httpx.Client(
        transport=httpx.HTTPTransport(local_address=f"127.0.0.{number}"), timeout=60
    )

"""The HTTP side of rollout servers: how they are reached, and what their answers mean."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, wait
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar

import httpx

from shared.errors import RolloutError, RolloutServerError
from student_trainer.runtime.threads import in_thread

logger = logging.getLogger(__name__)

T = TypeVar("T")

Backend = Literal["nccl", "gloo"]

GENERATE = "inference/v1/generate"
CONNECT_SECONDS = 10.0
START = (
    "VLLM_SERVER_DEV_MODE=1 vllm serve STUDENT --tokens-only "
    """--weight-transfer-config '{"backend": "nccl"}'"""
)
_LOOK_SECONDS = 1.0
_POLL_SECONDS = 0.2


def never() -> bool:
    """Return False: a run that is not told to end."""
    return False


@dataclass(frozen=True)
class ServerOptions:
    """The addresses of the rollout servers, and the rules of their use.

    Attributes:
        urls: addresses of replicas.
        transfer: what carries the weights.
        seconds: longest wait for a server that is away, and for one to take weights.
        max_in_flight: requests at once to each server, from this process.
        max_tokens_in_flight: tokens of prompts, and of completions at their longest, at once to
            all servers, from this process; None for no bound.
        api_key: sent with each request.
    """

    urls: tuple[str, ...]
    transfer: Backend
    seconds: float = 600.0
    max_in_flight: int = 256
    max_tokens_in_flight: int | None = None
    api_key: str | None = None

    @property
    def headers(self) -> dict[str, str]:
        """The headers of each request."""
        return {} if self.api_key is None else {"Authorization": f"Bearer {self.api_key}"}


def checked(answer: httpx.Response) -> httpx.Response:
    """Return an answer of success.

    Raises:
        RolloutError: it is none; names the address, the status and what the server said.
    """
    if answer.status_code == 401:
        raise RolloutError(f"{answer.url} wants another key; see --rollout_api_key_file")
    if not answer.is_success:
        text = " ".join(answer.text.split())[:300]
        raise RolloutError(f"{answer.url} answered {answer.status_code}: {text}")
    return answer


def content(answer: httpx.Response) -> Mapping[str, Any]:
    """Return the JSON object of an answer of success.

    Raises:
        RolloutError: it is no success, or no object.
    """
    try:
        value = checked(answer).json()
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise RolloutError(f"{answer.url} answered no JSON object: {answer.text[:80]!r}")
    return value


def only_choice(answer: httpx.Response) -> Mapping[str, Any]:
    """Return the only completion of an answer to `GENERATE`.

    Raises:
        RolloutError: it has none.
    """
    choices = content(answer).get("choices")
    if not isinstance(choices, list) or len(choices) != 1:
        raise RolloutError(f"{answer.url} answered no completion: {answer.text[:80]!r}")
    choice: Mapping[str, Any] = choices[0]
    return choice


def at_once(
    calls: Sequence[Callable[[], T]],
    told_to_end: Callable[[], bool] = never,
    *,
    name: str = "rollout-server",
) -> list[T]:
    """Return the results of calls to servers that run in threads of their own.

    One after another, servers would make a step longer by the time of each. One that fails is
    raised at once, because the others may wait for it.

    Raises:
        RolloutServerError: the run was told to end before they ended.
    """
    running = [in_thread(call, name=name) for call in calls]
    waiting = set(running)
    while waiting:
        ended, waiting = wait(waiting, timeout=_POLL_SECONDS, return_when=FIRST_EXCEPTION)
        for call in ended:
            call.result()
        if waiting and told_to_end():
            raise RolloutServerError("told to end while it waited for a rollout server")
    return [call.result() for call in running]


def wait_for_servers(
    options: ServerOptions, longest: int, told_to_end: Callable[[], bool] = never
) -> dict[str, str]:
    """Return {address: name of its weights} of the servers that answer, as soon as there is one.

    Raises:
        RolloutServerError: none answers in time, or before the run was told to end.
        RolloutError: one takes no weights, refuses the key, or its context is below ``longest``.
    """
    end = time.monotonic() + options.seconds
    told = False
    limits = httpx.Limits(max_connections=None)
    with httpx.Client(headers=options.headers, timeout=CONNECT_SECONDS, limits=limits) as client:
        while True:
            looks = at_once(
                [partial(_look, client, url, longest) for url in options.urls], told_to_end
            )
            answering = {
                url: name for url, name in zip(options.urls, looks, strict=True) if name is not None
            }
            if answering:
                return answering
            if time.monotonic() > end:
                raise RolloutServerError(
                    f"no rollout server answers at {', '.join(options.urls)} after "
                    f"{options.seconds:.0f} s; start one with {START}"
                )
            if not told:
                logger.warning("waiting for a rollout server at %s", ", ".join(options.urls))
                told = True
            at_once([partial(time.sleep, _LOOK_SECONDS)], told_to_end)


def _look(client: httpx.Client, url: str, longest: int) -> str | None:
    """Return the name of a server's weights, None if it is not up.

    Raises:
        RolloutError: it can never do what a run requires, see `wait_for_servers`.
    """
    try:
        if not client.get(f"{url}/health").is_success:
            return None
        weights, models = client.get(f"{url}/weight_info"), client.get(f"{url}/v1/models")
    except httpx.HTTPError:
        return None
    if weights.status_code == 404:
        raise RolloutError(f"{url} takes no weights; start it with {START}")
    if not weights.is_success:
        return None
    try:
        context = int(content(models)["data"][0]["max_model_len"])
    except (KeyError, IndexError, TypeError, ValueError):
        raise RolloutError(
            f"{models.url} tells no context: {models.text[:80]!r}; start the server with {START}"
        ) from None
    if context < longest:
        raise RolloutError(
            f"{url} has a context of {context} tokens, and prompts with completions have up to "
            f"{longest}; start it with --max-model-len {longest}"
        )
    return str(content(weights).get("weight_version"))

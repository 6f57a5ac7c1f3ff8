"""The rollout engine that generates on vLLM servers, stock, on other GPUs.

A server takes and gives token ids (``/inference/v1/generate``). Its weights come through vLLM's own
weight transfer, see `student_trainer.rollouts.transfer`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from typing import Any, Self, TypeVar

import httpx
import numpy as np
import torch
import torch.distributed as dist

from shared.errors import RolloutError, RolloutServerError
from shared.sampling import uniforms
from student_trainer.rollouts.base import Rollout, RolloutRequest
from student_trainer.rollouts.drift import DRIFT_TOLERANCE, probe_prompt, trainer_logprobs
from student_trainer.rollouts.transfer import Backend, ServerControl, open_transfer
from student_trainer.rollouts.weights import StudentWeights
from student_trainer.runtime.threads import in_thread

logger = logging.getLogger(__name__)

T = TypeVar("T")

GENERATE = "inference/v1/generate"
_LOOK_SECONDS = 1.0
_ATTEMPTS = 3  # one may meet a server that dies, the next another
_CONNECT_SECONDS = 10.0
_CONNECTIONS = 16  # of a client


@dataclass(frozen=True)
class ServerOptions:
    """How to reach the rollout servers.

    Attributes:
        urls: addresses of replicas.
        transfer: what carries the weights.
        seconds: longest wait for a server that is away, and for an answer.
        max_in_flight: requests at once to each server, from this process.
        api_key: sent with each request.
    """

    urls: tuple[str, ...]
    transfer: Backend
    seconds: float = 600.0
    max_in_flight: int = 256
    api_key: str | None = None

    @property
    def headers(self) -> dict[str, str]:
        """The headers of each request."""
        return {} if self.api_key is None else {"Authorization": f"Bearer {self.api_key}"}


class _OtherWeightsError(Exception):
    """A server wrote with other weights than it was sent."""


class RolloutServers:
    """The vLLM servers of a run and their weights; use it in a ``with`` block.

    All ranks have one each. They call `sync` together; requests of one go out alone.

    Args:
        model: the student, as it is called in training (a peft model too), not in DDP. It may be
            sharded by FSDP2 or ZeRO-3.
        options: how to reach them.
        dtype: dtype of the servers' weights, such as "bfloat16".
        longest: longest prompt and completion together, in tokens.

    Attributes:
        live: addresses that took part in the last transfer, and have answered since.
        drift: largest mean difference in log-prob to the trainer after the last `sync`.
    """

    def __init__(self, model: Any, options: ServerOptions, *, dtype: str, longest: int) -> None:
        self.model = model
        self.options = options
        self.dtype = dtype
        self.longest = longest
        self.live: list[str] = []
        self.drift: float | None = None
        self.version: int | None = None
        self._weights = StudentWeights(model, getattr(torch, dtype))
        self._control: ServerControl | None = None
        self._transfer: Any = None
        self._joined: list[str] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave the group of the transfer; the servers run on."""
        if self._control is not None:
            self._control.join_anew()  # first: a group is left at once only by its last member
            self._control.close()
            self._control = None
        if self._transfer is not None:
            self._transfer.shutdown()
            self._transfer = None

    def sync(self, weight_version: int) -> None:
        """Send the student's present weights to all servers that answer, unless they have them.

        A server that was away and is back takes part again. One that fails meanwhile is left out,
        and the transfer is repeated for the others.

        Raises:
            RolloutError: no server answers in time, or the log-probs of one differ from the
                trainer's by more than rounding.
        """
        if weight_version == self.version:
            return
        self.version = None
        for _ in range(_ATTEMPTS):
            failure = self._try_to_send(weight_version)
            if failure is None:
                break
            logger.warning("weights did not reach all rollout servers: %s", failure)
        else:
            raise RolloutServerError(
                f"weights did not reach the rollout servers in {_ATTEMPTS} attempts ({failure}); "
                "start the servers again, with this student"
            )
        self.drift = self._measure_drift()
        if not self.drift <= DRIFT_TOLERANCE[self.dtype]:
            raise RolloutError(
                f"a rollout server's log-probs differ by {self.drift:.2g} from the trainer's own "
                f"after new weights: does it serve this student, as --dtype {self.dtype}?"
            )
        self.version = weight_version

    def rollouts(self, **options: Any) -> ServerRollouts:
        """Return a rollout engine that generates here; the arguments are those of its class."""
        return ServerRollouts(self, **options)

    def lose(self, url: str, reason: object) -> None:
        """Ask a server no more until the next transfer, as it failed."""
        if url in self.live:
            logger.warning("rollout server %s is lost: %s", url, reason)
            self.live = [other for other in self.live if other != url]

    def _try_to_send(self, weight_version: int) -> str | None:
        """Send the weights to all servers that answer; return what failed meanwhile, or None."""
        failure: Exception | None = None
        answering: list[str] = []
        if _rank() == 0:
            try:
                answering = wait_for_servers(self.options, self.longest)
            except RolloutError as error:
                failure = error
        answering, failure = _from_first_rank((answering, failure))
        if failure is not None:
            raise failure
        for attempt in (partial(self._join, answering, weight_version), self._send):
            try:
                attempt()
            except (RolloutError, RuntimeError) as error:
                failure = error
            failed = [text for text in _from_all(str(failure or "")) if text]
            if failed:
                self._leave()
                return failed[0]
        self.live = answering
        return None

    def _send(self) -> None:
        self._transfer.send_weights()

    def _join(self, answering: list[str], weight_version: int) -> None:
        """Form a group with these servers, unless there is one."""
        if answering == self._joined and self._transfer is not None:
            if self._control is not None:
                self._control.version = str(weight_version)
            return
        self._leave()
        if _rank() == 0:
            self._control = ServerControl(
                answering, seconds=self.options.seconds, headers=self.options.headers
            )
            self._control.version = str(weight_version)
            self._control.join_anew()
            if self.options.transfer == "gloo":
                self._control.prepare_cpu()
        self._transfer = open_transfer(
            self.options.transfer, self._weights, self._control, seconds=self.options.seconds
        )
        self._joined = answering

    def _leave(self) -> None:
        self.close()
        self._joined = []

    def _measure_drift(self) -> float:
        """Return the largest mean difference in log-prob between a server and the trainer."""
        params = {"max_tokens": 8, "seed": 0, "logprobs": 0, "detokenize": False}
        prompt = probe_prompt(self.model)
        probes: list[tuple[list[int], list[float]]] = []
        failure: Exception | None = None
        if _rank() == 0:
            try:
                asked = [partial(self._ask, url, prompt, params) for url in self.live]
                for answer in _at_once(asked, name="probe"):
                    [choice] = answer["choices"]
                    logprobs = [row["logprob"] for row in choice["logprobs"]["content"]]
                    probes.append((choice["token_ids"], logprobs))
            except (httpx.HTTPError, RolloutError) as error:
                failure = RolloutServerError(f"a rollout server does not answer a probe: {error}")
        probes, failure = _from_first_rank((probes, failure))
        if failure is not None:
            raise failure
        drifts = []
        own: dict[tuple[int, ...], torch.Tensor] = {}  # replicas write the same, but for rounding
        for written, theirs in probes:
            key = tuple(written)
            if key not in own:
                rows = trainer_logprobs(self.model, [*prompt, *written])[len(prompt) - 1 : -1]
                own[key] = rows.gather(1, torch.tensor(written)[:, None])[:, 0]  # [T]
            drifts.append(float((own[key] - torch.tensor(theirs)).abs().mean()))
        return max(drifts)

    def _ask(self, url: str, prompt: list[int], params: dict[str, Any]) -> Any:
        body = {"token_ids": prompt, "sampling_params": params}
        answer = httpx.post(
            f"{url}/{GENERATE}", json=body, headers=self.options.headers, timeout=60
        )
        return _checked_answer(answer).json()


class ServerRollouts:
    """A rollout engine over `RolloutServers`, which several of these may share.

    Args:
        servers: closed by the caller, not here.
        stop_ids: tokens that end a completion.
        max_new_tokens: longest completion.
        temperature: temperature of the sampling; 0 is greedy.
        vocab_size: number of ids that may be sampled; the output layer may have padding above.
    """

    elsewhere = True

    def __init__(
        self,
        servers: RolloutServers,
        *,
        stop_ids: Sequence[int],
        max_new_tokens: int,
        temperature: float,
        vocab_size: int,
    ) -> None:
        self.servers = servers
        output_size = servers.model.config.get_text_config().vocab_size
        padding = range(vocab_size, output_size)
        self._params: dict[str, Any] = {
            "max_tokens": max_new_tokens,
            "temperature": temperature,
            "stop_token_ids": list(stop_ids),
            "detokenize": False,
            # vLLM's own defaults, not those of the checkpoint's generation_config.json
            "top_p": 1.0,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
        }
        if padding:
            self._params["logit_bias"] = {str(token): -100.0 for token in padding}

    def sync(self, weight_version: int) -> None:
        """Send the student's present weights, as `RolloutServers.sync` says."""
        self.servers.sync(weight_version)

    def generate(self, requests: Sequence[RolloutRequest]) -> Iterator[list[tuple[int, Rollout]]]:
        """Yield groups of (index of the request, rollout), as `RolloutEngine.generate` says.

        A request whose server fails is sent to another; with equal weights and an equal key the
        completion is the same there.

        Raises:
            RolloutError: no server is left, or one wrote with other weights.
        """
        finished: SimpleQueue[tuple[int, Rollout] | None] = SimpleQueue()
        stopped = asyncio.Event()
        loop = asyncio.new_event_loop()

        def run() -> None:
            try:
                loop.run_until_complete(self._write_all(requests, finished, stopped))
            finally:
                loop.close()
                finished.put(None)

        writer = in_thread(run, name="rollouts")
        try:
            while (item := finished.get()) is not None:
                yield [item]
            writer.result()
        finally:
            with contextlib.suppress(RuntimeError):  # its loop has ended
                loop.call_soon_threadsafe(stopped.set)

    async def _write_all(
        self,
        requests: Sequence[RolloutRequest],
        finished: SimpleQueue[tuple[int, Rollout] | None],
        stopped: asyncio.Event,
    ) -> None:
        """Put each request's rollout into the queue; end early when ``stopped`` is set."""
        options = self.servers.options
        busy: Counter[str] = Counter()
        most = options.max_in_flight * max(1, len(self.servers.live))
        places = asyncio.Semaphore(most)
        async with contextlib.AsyncExitStack() as stack:
            clients = [
                await stack.enter_async_context(client)
                for client in _clients(options, min(most, len(requests)))
            ]

            async def write(index: int) -> None:
                async with places:
                    client = clients[index % len(clients)]
                    rollout = await self._write(client, requests[index], busy)
                finished.put((index, rollout))

            tasks = [asyncio.ensure_future(write(index)) for index in range(len(requests))]
            stop = asyncio.ensure_future(stopped.wait())
            writing = asyncio.gather(*tasks)
            try:
                both: list[asyncio.Future[Any]] = [writing, stop]
                await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
                if writing.done():
                    await writing
            finally:
                for task in (*tasks, stop):
                    task.cancel()
                await asyncio.gather(writing, stop, *tasks, return_exceptions=True)

    async def _write(
        self, client: httpx.AsyncClient, request: RolloutRequest, busy: Counter[str]
    ) -> Rollout:
        """Let the server with the fewest requests write the completion, or the next if it fails."""
        seed = int(uniforms(*request.key, count=1)[0] * 2**53)
        body = {
            "token_ids": request.prompt_ids.tolist(),
            "sampling_params": {**self._params, "seed": seed},
        }
        while self.servers.live:
            url = min(self.servers.live, key=lambda one: (busy[one], one))
            busy[url] += 1
            try:
                answer = await client.post(f"{url}/{GENERATE}", json=body)
                if answer.status_code >= 500:
                    raise httpx.HTTPStatusError(
                        f"answered {answer.status_code}", request=answer.request, response=answer
                    )
                return self._rollout(url, _checked_answer(answer).json())
            except (httpx.HTTPError, _OtherWeightsError) as error:
                self.servers.lose(url, error or type(error).__name__)
            finally:
                busy[url] -= 1
        raise RolloutServerError(
            "no rollout server is left; start them again, and the run goes on from its last "
            "checkpoint"
        )

    def _rollout(self, url: str, answer: Any) -> Rollout:
        [choice] = answer["choices"]
        versions = {span["version"] for span in choice["weight_versions"] or []}
        if versions - {str(self.servers.version)}:  # it was started again, or another run uses it
            raise _OtherWeightsError(
                f"it wrote with weights {', '.join(sorted(versions))}, not {self.servers.version}"
            )
        if choice["finish_reason"] not in ("stop", "length"):
            raise RolloutError(f"{url} ended a completion with {choice['finish_reason']!r}")
        ids = np.asarray(choice["token_ids"], np.uint32)
        return Rollout(ids, truncated=choice["finish_reason"] == "length")


def _clients(options: ServerOptions, in_flight: int) -> list[httpx.AsyncClient]:
    """Return clients that share so many requests.

    At each request a client of httpx looks through all of its connections, so one client alone
    would spend four times as long on twice as many.
    """
    context = httpx.create_ssl_context()  # takes longer to make than a client
    timeout = httpx.Timeout(None, connect=_CONNECT_SECONDS)
    limits = httpx.Limits(max_connections=None)
    return [
        httpx.AsyncClient(headers=options.headers, timeout=timeout, limits=limits, verify=context)
        for _ in range(-(-in_flight // _CONNECTIONS) or 1)
    ]


def wait_for_servers(options: ServerOptions, longest: int) -> list[str]:
    """Return the addresses that answer, as soon as there is one.

    Raises:
        RolloutServerError: none answers in time.
        RolloutError: one takes no weights, refuses the key, or its context is below ``longest``.
    """
    end = time.monotonic() + options.seconds
    told = False
    limits = httpx.Limits(max_connections=None)
    with httpx.Client(headers=options.headers, timeout=_CONNECT_SECONDS, limits=limits) as client:
        while True:
            looks = [partial(_answers, client, url, longest) for url in options.urls]
            answers = _at_once(looks, name="look")
            answering = [url for url, up in zip(options.urls, answers, strict=True) if up]
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
            time.sleep(_LOOK_SECONDS)


START = (
    "VLLM_SERVER_DEV_MODE=1 vllm serve STUDENT --tokens-only "
    """--weight-transfer-config '{"backend": "nccl"}'"""
)


def _answers(client: httpx.Client, url: str, longest: int) -> bool:
    """Return whether a server is up; raise what it can never do, see `wait_for_servers`."""
    try:
        if not client.get(f"{url}/health").is_success:
            return False
        weights, models = client.get(f"{url}/weight_info"), client.get(f"{url}/v1/models")
    except httpx.HTTPError:
        return False
    if weights.status_code == 404:
        raise RolloutError(f"{url} takes no weights; start it with {START}")
    context = _checked_answer(models).json()["data"][0]["max_model_len"]
    if context < longest:
        raise RolloutError(
            f"{url} has a context of {context} tokens, and prompts with completions have up to "
            f"{longest}; start it with --max-model-len {longest}"
        )
    return weights.is_success


def _checked_answer(answer: httpx.Response) -> httpx.Response:
    if answer.status_code == 401:
        raise RolloutError(f"{answer.url} wants another key; see --rollout_api_key_file")
    if not answer.is_success:
        text = " ".join(answer.text.split())[:300]
        raise RolloutError(f"{answer.url} answered {answer.status_code}: {text}")
    return answer


def _at_once(functions: Sequence[Callable[[], T]], *, name: str) -> list[T]:
    """Return the results of functions that run in threads of their own.

    One after another, servers would make a step longer by the time of each.
    """
    return [call.result() for call in [in_thread(one, name=name) for one in functions]]


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _from_first_rank(value: T) -> T:
    """Return the first rank's value on all ranks."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    held: list[Any] = [value]
    dist.broadcast_object_list(held, src=0)
    return held[0]


def _from_all(value: T) -> list[T]:
    """Return the values of all ranks."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    held: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(held, value)
    return held

"""The rollout engine that generates on vLLM servers, which take and give token ids."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
from numpy.typing import NDArray

from shared.errors import RolloutError, RolloutServerError
from student_trainer.rollouts.base import (
    NO_FILTER,
    Rollout,
    RolloutRequest,
    TokenFilter,
    proposed_ids,
    vllm_sampling,
)
from student_trainer.rollouts.http import (
    CONNECT_SECONDS,
    GENERATE,
    ServerOptions,
    only_choice,
)
from student_trainer.rollouts.stalls import StalledServerError, StallWatch
from student_trainer.rollouts.token_budget import TokenBudget
from student_trainer.runtime.threads import in_thread

if TYPE_CHECKING:
    from student_trainer.rollouts.servers import RolloutServers

_CONNECTIONS = 16  # of a client
_Finished = SimpleQueue[tuple[int, Rollout] | None]


class _LostServerError(Exception):
    """A server that ended a completion early, or wrote it with other weights than it was sent."""


class ServerRollouts:
    """A rollout engine over `RolloutServers`, which several of these may share.

    Args:
        servers: closed by the caller, not here.
        stop_ids: tokens that end a completion.
        max_new_tokens: longest completion.
        temperature: temperature of the sampling; 0 is greedy.
        vocab_size: number of ids that may be sampled; the output layer may have padding above.
        token_filter: the tokens that one is drawn from.
        student_top_m: ids that each rollout proposes at each position; 0 for none.
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
        token_filter: TokenFilter = NO_FILTER,
        student_top_m: int = 0,
    ) -> None:
        self.servers = servers
        self._student_top_m, self._vocab_size = student_top_m, vocab_size
        self._params = vllm_sampling(
            stop_ids=stop_ids,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            token_filter=token_filter,
            student_top_m=student_top_m,
            vocab_size=vocab_size,
            output_size=servers.model.config.get_text_config().vocab_size,
        )

    def sync(self, weight_version: int) -> None:
        """Send the student's present weights, as `RolloutServers.sync` says."""
        self.servers.sync(weight_version)

    def generate(self, requests: Sequence[RolloutRequest]) -> Iterator[list[tuple[int, Rollout]]]:
        """Yield groups of (index of the request, rollout), as `RolloutEngine.generate` says.

        A request whose server fails is sent to another; with equal weights and an equal key the
        completion is the same there.

        Raises:
            RolloutServerError: no server is left.
            RolloutError: a server refuses a request.
        """
        finished: _Finished = SimpleQueue()
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
        self, requests: Sequence[RolloutRequest], finished: _Finished, stopped: asyncio.Event
    ) -> None:
        """Put each request's rollout into the queue; end early when ``stopped`` is set."""
        places = _Places(self.servers)
        budget = TokenBudget(self.servers.options.max_tokens_in_flight)
        options, live = self.servers.options, max(1, len(self.servers.live))
        in_flight = min(options.max_in_flight * live, len(requests))
        async with contextlib.AsyncExitStack() as stack:
            clients = [
                await stack.enter_async_context(client) for client in _clients(options, in_flight)
            ]

            watch = StallWatch(clients[0], options.seconds)

            async def write(index: int) -> None:
                client, request = clients[index % len(clients)], requests[index]
                async with budget.hold(len(request.prompt_ids) + self._params["max_tokens"]):
                    rollout = await self._write(client, request, places, watch)
                finished.put((index, rollout))

            tasks = [asyncio.ensure_future(write(index)) for index in range(len(requests))]
            stop = asyncio.ensure_future(stopped.wait())
            watching = asyncio.ensure_future(watch.run())
            writing = asyncio.gather(*tasks)
            try:
                both: list[asyncio.Future[Any]] = [writing, stop]
                await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
                if writing.done():
                    await writing
            finally:
                for task in (*tasks, stop, watching):
                    task.cancel()
                await asyncio.gather(writing, stop, watching, *tasks, return_exceptions=True)

    async def _write(
        self,
        client: httpx.AsyncClient,
        request: RolloutRequest,
        places: _Places,
        watch: StallWatch,
    ) -> Rollout:
        """Let the server with the fewest requests write the completion, or the next if it fails."""
        body = {
            "model": self.servers.adapter,
            "token_ids": request.prompt_ids.tolist(),
            "sampling_params": {**self._params, "seed": request.seed},
        }
        while True:
            async with places.take() as url:
                try:
                    async with watch.over(url):
                        answer = await client.post(f"{url}/{GENERATE}", json=body)
                    if answer.status_code >= 500 or answer.status_code == 404:
                        raise _LostServerError(f"it answered {answer.status_code}")
                    return self._rollout(url, only_choice(answer))
                except (httpx.HTTPError, _LostServerError, StalledServerError) as error:
                    self.servers.lose(url, str(error) or type(error).__name__)

    def _rollout(self, url: str, choice: Mapping[str, Any]) -> Rollout:
        try:
            spans = choice["weight_versions"] or []
            versions, reason = {span["version"] for span in spans}, choice["finish_reason"]
            ids = np.asarray(choice["token_ids"], np.uint32)
            wanted = self._student_top_m > 0
            proposed = self._proposed(choice["logprobs"]["content"]) if wanted else None
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise RolloutError(f"{url} answered a malformed completion: {error!r}") from error
        if versions != {self.servers.label}:  # it was started again, or another run uses it
            raise _LostServerError(
                f"it wrote with weights {', '.join(sorted(versions))}, not {self.servers.label}"
            )
        if reason not in ("stop", "length"):  # it is being shut down
            raise _LostServerError(f"it ended a completion with {reason!r}")
        return Rollout(ids, reason == "length", proposed)

    def _proposed(self, positions: Sequence[Mapping[str, Any]]) -> NDArray[np.uint32]:
        """Return the ids [T, m] that are most probable by the server's candidates."""
        candidates = [
            [(one["token_id"], one["logprob"]) for one in position["top_logprobs"]]
            for position in positions
        ]
        return proposed_ids(candidates, self._student_top_m, self._vocab_size)


def _clients(options: ServerOptions, in_flight: int) -> list[httpx.AsyncClient]:
    """Return clients that share so many requests.

    At each request a client of httpx looks through all of its connections, so one client alone
    would spend four times as long on twice as many.
    """
    context = httpx.create_ssl_context()  # takes longer to make than a client
    # A long completion takes its time; a server that hangs is found by `StallWatch`.
    timeout = httpx.Timeout(None, connect=CONNECT_SECONDS)
    limits = httpx.Limits(max_connections=None)
    return [
        httpx.AsyncClient(headers=options.headers, timeout=timeout, limits=limits, verify=context)
        for _ in range(-(-in_flight // _CONNECTIONS) or 1)
    ]


class _Places:
    """The places for requests at the servers that are left: so many at once to each."""

    def __init__(self, servers: RolloutServers) -> None:
        self._servers = servers
        self._busy: Counter[str] = Counter()
        self._freed = asyncio.Condition()

    @contextlib.asynccontextmanager
    async def take(self) -> AsyncIterator[str]:
        """Hold a place at the server with the fewest requests, once there is one.

        Raises:
            RolloutServerError: no server is left.
        """
        most = self._servers.options.max_in_flight

        def may_choose() -> bool:
            live = self._servers.live
            return not live or min(self._busy[url] for url in live) < most

        async with self._freed:
            await self._freed.wait_for(may_choose)
            if not self._servers.live:
                raise RolloutServerError(
                    "no rollout server is left; start them again, and the run goes on from its "
                    "last checkpoint"
                )
            url = min(self._servers.live, key=lambda one: (self._busy[one], one))
            self._busy[url] += 1
        try:
            yield url
        finally:
            async with self._freed:
                self._busy[url] -= 1
                (self._freed.notify if self._servers.live else self._freed.notify_all)()

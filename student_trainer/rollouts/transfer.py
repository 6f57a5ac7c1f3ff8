"""The transfer of the student's weights to vLLM servers, through vLLM's own interface.

vLLM calls it weight transfer: `init`, `start`, `update`, `finish`, on routes of their own, and
engines that bring the bytes. Rank 0 drives the servers; the others gather with it.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

import httpx
import torch

from shared.errors import RolloutError
from student_trainer.rollouts.http import (
    CONNECT_SECONDS,
    Backend,
    at_once,
    checked,
    content,
    never,
)
from student_trainer.rollouts.weights import StudentWeights, WeightShape
from student_trainer.runtime.threads import in_thread

UNFINISHED = "unfinished"  # the name of weights that came only in part
_ANSWER_SECONDS = 30.0
_POLL_SECONDS = 0.02


class ServerControl:
    """The control routes of several vLLM servers, which are driven as one.

    It is what vLLM names a ``VLLMWeightSyncClient``.

    Args:
        urls: addresses of the servers.
        seconds: longest wait for an answer.
        told_to_end: whether the run was told to end: then nothing is waited for.

    Attributes:
        version: name of the weights that `finish_weight_update` tells the servers.
        refusal: why servers did not join the group, once they have refused.
        give_up: is called in a thread of its own where servers do not receive the weights that the
            trainer sends, to end its sending.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        seconds: float,
        headers: dict[str, str],
        told_to_end: Callable[[], bool] = never,
    ) -> None:
        self.urls = tuple(urls)
        self._told_to_end = told_to_end
        self.version = ""
        self.refusal: Exception | None = None
        self.give_up: Callable[[], None] = lambda: None
        timeout = httpx.Timeout(seconds, connect=CONNECT_SECONDS)
        # Servers that join wait for all others, so none of them may wait for a connection.
        limits = httpx.Limits(max_connections=None)
        self._client = httpx.Client(timeout=timeout, headers=headers, limits=limits)

    def workers(self) -> list[int]:
        """Return the number of workers of each server.

        Raises:
            RolloutError: a server does not say it.
        """
        counts = []
        for url in self.urls:
            try:
                answer = self._client.get(f"{url}/get_world_size", timeout=_ANSWER_SECONDS)
                counts.append(int(content(answer)["world_size"]))
            except (httpx.HTTPError, KeyError, TypeError, ValueError) as error:
                raise RolloutError(f"{url} tells no number of workers: {error!r}") from error
        return counts

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Let all workers join the group; each server's follow those of the one before.

        Raises:
            RolloutError: one refuses.
        """
        offset = init_info["rank_offset"]
        infos = []
        try:
            for count in self.workers():
                infos.append({"init_info": {**init_info, "rank_offset": offset}})
                offset += count
            self.post_all("init_weight_transfer_engine", infos)
        except RolloutError as error:
            self.refusal = error
            raise

    def start_weight_update(self) -> None:
        """Stop writing, and prepare the models for new weights."""
        self.pause()
        self.post_all("start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        """Receive the weights; returns when they are loaded."""
        try:
            self.post_all("update_weights", [{"update_info": update_info}] * len(self.urls))
        except RolloutError:
            self.give_up()
            raise

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Finish the models, name their weights, and write again."""
        version = weight_version or self.version
        self.post_all("finish_weight_update", [{"weight_version": version}] * len(self.urls))
        self.resume()

    def pause(self) -> None:
        """Stop writing, once what was begun is written, and drop the prefix cache."""
        self.post_all("pause?mode=wait&clear_cache=true")

    def resume(self) -> None:
        """Write again."""
        self.post_all("resume")

    def name_weights(self, version: str) -> None:
        """Name the weights, as `finish_weight_update` does."""
        self.post_all("update_weight_version", [{"new_version": version}] * len(self.urls))

    def prepare_cpu(self) -> None:
        """Make seeded sampling work on a CPU, see `shared.vllm_sampling`."""
        self.call_workers("spare_generators")

    def call_workers(self, method: str, **arguments: Any) -> list[list[Any]]:
        """Call a method of all workers; return their results, a list for each server.

        Raises:
            RolloutError: one fails.
        """
        call = {"method": method, "kwargs": arguments}
        answers = self.post_all("collective_rpc", [call] * len(self.urls))
        return [list(content(answer).get("results") or []) for answer in answers]

    def load_adapter(self, name: str, folders: Sequence[str]) -> str | None:
        """Load an adapter from a folder of each server; return why one refuses it, or None.

        Raises:
            RolloutError: a server does not answer.
        """
        bodies = [{"lora_name": name, "lora_path": folder} for folder in folders]
        try:
            self.post_all("v1/load_lora_adapter", bodies)
        except RolloutError as error:
            if isinstance(error.__cause__, httpx.HTTPError):
                raise
            return str(error)
        return None

    def unload_adapter(self, name: str) -> None:
        """Drop an adapter by its name; one that is not there is passed over."""
        with suppress(RolloutError):
            self.post_all("v1/unload_lora_adapter", [{"lora_name": name}] * len(self.urls))

    def drop_adapter(self, run: str, name: str) -> None:
        """Drop a run's adapter and its files, if the servers still answer."""
        call = {"method": "delete_adapters", "kwargs": {"run": run}}
        post = partial(self._client.post, timeout=_ANSWER_SECONDS)

        def drop(url: str) -> None:
            with suppress(httpx.HTTPError):
                post(f"{url}/v1/unload_lora_adapter", json={"lora_name": name})
                post(f"{url}/collective_rpc", json=call)

        at_once([partial(drop, url) for url in self.urls])

    def join_anew(self) -> None:
        """Let the servers leave a group that they are in, and end a transfer that was cut off.

        One that is dead or does not answer is passed over: the next call shows it.
        """
        cut_off = {"weight_version": UNFINISHED}
        post = partial(self._client.post, timeout=_ANSWER_SECONDS)

        def leave(url: str) -> None:
            with suppress(httpx.HTTPError, RolloutError):
                state = content(self._client.get(f"{url}/is_paused", timeout=CONNECT_SECONDS))
                if state.get("is_paused"):
                    post(f"{url}/finish_weight_update", json=cut_off)
                post(f"{url}/shutdown_weight_transfer_engine")
                post(f"{url}/resume")

        at_once([partial(leave, url) for url in self.urls])

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def post_all(self, path: str, bodies: Sequence[Any] | None = None) -> list[httpx.Response]:
        """Call all servers at once, because they wait for one another in some calls.

        Raises:
            RolloutError: one of them failed, or the run was told to end meanwhile.
        """
        calls = [
            _posting(self._client, f"{url}/{path}", body)
            for url, body in zip(self.urls, bodies or [None] * len(self.urls), strict=True)
        ]
        return at_once(calls, self._told_to_end, name=path)


def _posting(client: httpx.Client, url: str, body: Any) -> Callable[[], httpx.Response]:
    def post() -> httpx.Response:
        try:
            return checked(client.post(url, json=body))
        except httpx.HTTPError as error:
            raise RolloutError(f"{url}: {str(error) or type(error).__name__}") from error

    return post


class _Source:
    """The student's weights as what vLLM names a ``WeightSource``."""

    def __init__(self, weights: StudentWeights) -> None:
        self._weights = weights
        self._given: Iterator[tuple[str, torch.Tensor]] | None = None

    def metadata(self) -> list[WeightShape]:
        return self._weights.shapes()

    def held_names(self) -> None:
        return None

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        self._given = iter(self._weights)
        return self._given

    def give_rest(self) -> None:
        """Iterate to the end, from the first if nothing was given yet."""
        for _ in iter(self) if self._given is None else self._given:
            pass
        self._given = None


class Transfer:
    """A transfer of weights to servers that have joined its group, on all ranks.

    Args:
        engine: vLLM's engine of the trainer.
        source: what the engine sends.
    """

    def __init__(self, engine: Any, source: _Source) -> None:
        self._engine, self._source = engine, source

    def send(self) -> None:
        """Send the weights to all servers. All ranks call it.

        Where sending fails the weights are still iterated to the end, as other ranks gather with
        this one.
        """
        try:
            self._engine.send_weights()
        finally:
            self._source.give_rest()

    def close(self) -> None:
        """Leave the group."""
        self._engine.shutdown()


def open_transfer(
    backend: Backend, weights: StudentWeights, control: ServerControl | None, *, seconds: float
) -> Transfer:
    """Return the transfer; on rank 0 all servers of ``control`` have joined its group.

    Args:
        backend: "nccl" between GPUs, "gloo" between CPUs.
        control: the servers, on rank 0; None on the other ranks.
        seconds: longest wait for a server.

    Raises:
        RolloutError: a server did not join.
    """
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

    from student_trainer.runtime.vllm_plugin import register

    register()
    address, port, size = "", 0, 0
    if control is not None:
        address, port = _own_address(control.urls)
        size = 1 + sum(control.workers())
    rank = 0 if control is not None else 1
    info: Any
    if backend == "nccl":
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        info = NCCLTrainerInitInfo(address, port, size, rank=rank)
    else:
        from student_trainer.rollouts.gloo import GlooTrainerInitInfo

        info = GlooTrainerInitInfo(address, port, size, seconds, rank=rank)
    source = _Source(weights)
    join = partial(WeightTransferTrainerFactory.trainer_init, info, client=control, source=source)
    try:
        engine = join() if control is None else _unless_refused(join, control)
        if backend == "nccl" and control is not None:
            control.give_up = engine.shutdown  # aborts NCCL, which waits for a dead peer for ever
        return Transfer(engine, source)
    except (RuntimeError, ValueError) as error:
        raise RolloutError(f"the rollout servers did not join: {error}") from error


def _unless_refused(join: Callable[[], Any], control: ServerControl) -> Any:
    """Return what ``join`` returns, unless a server refuses: then nobody waits for the others.

    Raises:
        RolloutError: a server refuses.
    """
    gpu = torch.cuda.current_device() if torch.cuda.is_available() else None

    def on_same_gpu() -> Any:
        if gpu is not None:
            torch.cuda.set_device(gpu)  # each thread has its own
        return join()

    joined = in_thread(on_same_gpu, name="join")
    while not joined.done():
        if control.refusal is not None:
            raise control.refusal
        time.sleep(_POLL_SECONDS)
    return joined.result()


def _own_address(urls: Sequence[str]) -> tuple[str, int]:
    """Return the address at which all servers reach this machine, and a free port there.

    A server of another machine decides, because it cannot use the address by which one on this
    machine is reached.

    Raises:
        RolloutError: a server is not reached.
    """
    found: list[tuple[str, socket.AddressFamily]] = []
    for url in urls:
        parts = urlsplit(url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        try:
            with socket.create_connection((parts.hostname or "", port), CONNECT_SECONDS) as way:
                found.append((way.getsockname()[0], way.family))
        except OSError as error:
            raise RolloutError(f"{url} is not reachable: {error}") from error
    address, family = min(found, key=lambda one: ip_address(one[0]).is_loopback)
    with socket.create_server((address, 0), family=family) as free:
        return address, free.getsockname()[1]

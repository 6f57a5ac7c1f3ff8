"""The transfer of the student's weights to vLLM servers, through vLLM's own interface.

vLLM calls it weight transfer: `init`, `start`, `update`, `finish`, on routes of their own, and
engines that bring the bytes. Rank 0 drives the servers; the others gather with it.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, Literal
from urllib.parse import urlsplit

import httpx
import torch

from shared.errors import RolloutError
from student_trainer.rollouts.weights import StudentWeights, WeightShape
from student_trainer.runtime.threads import in_thread

Backend = Literal["nccl", "gloo"]


class ServerControl:
    """The control routes of several vLLM servers, which are driven as one.

    It is what vLLM names a ``VLLMWeightSyncClient``.

    Args:
        urls: addresses of the servers.
        seconds: longest wait for an answer.

    Attributes:
        version: name of the weights that `finish_weight_update` tells the servers.
    """

    def __init__(self, urls: Sequence[str], *, seconds: float, headers: dict[str, str]) -> None:
        self.urls = tuple(urls)
        self.version = ""
        # Servers that join wait for all others, so none of them may wait for a connection.
        limits = httpx.Limits(max_connections=None)
        self._client = httpx.Client(timeout=seconds, headers=headers, limits=limits)

    def workers(self) -> list[int]:
        """Return the number of workers of each server."""
        answers = [self._client.get(f"{url}/get_world_size") for url in self.urls]
        return [int(_checked(answer).json()["world_size"]) for answer in answers]

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Let all workers join the group; each server's follow those of the one before."""
        offset = init_info["rank_offset"]
        infos = []
        for count in self.workers():
            infos.append({"init_info": {**init_info, "rank_offset": offset}})
            offset += count
        self._post_all("init_weight_transfer_engine", infos)

    def start_weight_update(self) -> None:
        """Stop writing, and prepare the models for new weights."""
        self._post_all("pause?mode=wait&clear_cache=true")
        self._post_all("start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        """Receive the weights; returns when they are loaded."""
        self._post_all("update_weights", [{"update_info": update_info}] * len(self.urls))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Finish the models, name their weights, and write again."""
        version = weight_version or self.version
        self._post_all("finish_weight_update", [{"weight_version": version}] * len(self.urls))
        self._post_all("resume")

    def prepare_cpu(self) -> None:
        """Make seeded sampling work on a CPU, see `shared.vllm_sampling`."""
        self._post_all("collective_rpc", [{"method": "spare_generators"}] * len(self.urls))

    def join_anew(self) -> None:
        """Let the servers leave a group that they are in, and end a transfer that was cut off.

        One that is dead is passed over: the next call shows it.
        """
        for url in self.urls:
            with suppress(httpx.HTTPError):
                if self._client.get(f"{url}/is_paused").json()["is_paused"]:
                    self._client.post(f"{url}/finish_weight_update")
                self._client.post(f"{url}/shutdown_weight_transfer_engine")
                self._client.post(f"{url}/resume")

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _post_all(self, path: str, bodies: Sequence[Any] | None = None) -> None:
        """Call all servers at once, because they wait for one another in some calls.

        Raises:
            RolloutError: one of them failed.
        """
        calls: list[Future[Any]] = []
        for url, body in zip(self.urls, bodies or [None] * len(self.urls), strict=True):
            calls.append(in_thread(_posting(self._client, f"{url}/{path}", body), name=path))
        for call in calls:
            call.result()


def _posting(client: httpx.Client, url: str, body: Any) -> Callable[[], None]:
    def post() -> None:
        try:
            _checked(client.post(url, json=body))
        except httpx.HTTPError as error:
            raise RolloutError(f"{url}: {error or type(error).__name__}") from error

    return post


def _checked(answer: httpx.Response) -> httpx.Response:
    if answer.is_success:
        return answer
    text = " ".join(answer.text.split())[:300]
    raise RolloutError(f"{answer.url} answered {answer.status_code}: {text}")


class _Source:
    """The student's weights as what vLLM names a ``WeightSource``."""

    def __init__(self, weights: StudentWeights) -> None:
        self._weights = weights

    def metadata(self) -> list[WeightShape]:
        return self._weights.shapes()

    def held_names(self) -> None:
        return None

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return iter(self._weights)


def open_transfer(
    backend: Backend, weights: StudentWeights, control: ServerControl | None, *, seconds: float
) -> Any:
    """Return vLLM's trainer engine; on rank 0 all servers of ``control`` have joined its group.

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
        address, port = _own_address(control.urls[0])
        size = 1 + sum(control.workers())
    rank = 0 if control is not None else 1
    info: Any
    if backend == "nccl":
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        info = NCCLTrainerInitInfo(address, port, size, rank=rank)
    else:
        from student_trainer.rollouts.gloo import GlooTrainerInitInfo

        info = GlooTrainerInitInfo(address, port, size, seconds, rank=rank)
    try:
        return WeightTransferTrainerFactory.trainer_init(
            info, client=control, source=_Source(weights)
        )
    except (RuntimeError, ValueError) as error:
        raise RolloutError(f"the rollout servers did not join: {error}") from error


def _own_address(url: str) -> tuple[str, int]:
    """Return the address at which a server's host reaches this one, and a free port there."""
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    with socket.create_connection((parts.hostname or "", port), timeout=10) as way:
        address: str = way.getsockname()[0]
    with socket.create_server((address, 0)) as free:
        return address, free.getsockname()[1]

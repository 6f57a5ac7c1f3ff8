"""Weight transfer to a vLLM server over gloo, for machines without GPUs.

vLLM 0.32 sends weights by NCCL, from GPU to GPU. This is the same by gloo: an engine for its
workers, which vLLM's plug-in interface registers, and one for the trainer.
"""

from __future__ import annotations

import os
import socket
import time
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from vllm.distributed.weight_transfer.base import (
    TrainerInitInfo,
    TrainerWeightTransferEngine,
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from student_trainer.runtime import compat
from student_trainer.runtime.threads import in_thread

BACKEND = "gloo"
_POLL_SECONDS = 1e-4
_CONNECT_FACTOR = 5  # gloo waits so many times its timeout for the others to connect


@dataclass
class GlooInitInfo(WeightTransferInitInfo):
    """The data with which a vLLM worker joins the group.

    Attributes:
        master_address: host of the trainer that sends.
        master_port: its port, at which the group meets.
        rank_offset: rank in the group of the server's first worker.
        world_size: the sender and all workers of all servers.
        seconds: longest wait for another member.
    """

    master_address: str
    master_port: int
    rank_offset: int
    world_size: int
    seconds: float


@dataclass
class GlooUpdateInfo(WeightTransferUpdateInfo):
    """The weights that a transfer brings, in its order."""

    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]


class GlooWeightTransferEngine(WeightTransferEngine[GlooInitInfo, GlooUpdateInfo]):
    """The side of a vLLM worker: receives each weight and loads it into the model."""

    init_info_cls = GlooInitInfo
    update_info_cls = GlooUpdateInfo
    _group: _Group | None = None

    def init_transfer_engine(self, init_info: GlooInitInfo) -> None:
        parallel = self.parallel_config
        worker = parallel.data_parallel_index * parallel.world_size + parallel.rank
        self.shutdown()
        self._group = _Group(init_info, init_info.rank_offset + worker)

    def start_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        initialize_layerwise_reload(self.model)

    def finish_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)

    def receive_weights(self, update_info: GlooUpdateInfo) -> None:
        infos = zip(update_info.names, update_info.dtype_names, update_info.shapes, strict=True)
        assert self._group is not None
        try:
            for name, dtype, shape in infos:
                weight = torch.empty(shape, dtype=getattr(torch, dtype))
                self._group.broadcast(weight).wait()
                self.model.load_weights([(name, weight.to(self.device))])
        except BaseException:
            self.shutdown()  # closes the connections, so that nobody waits for this worker
            raise

    def shutdown(self) -> None:
        self._group = None


@dataclass
class GlooTrainerInitInfo(TrainerInitInfo):
    """The data with which the trainer joins the group; see `GlooInitInfo`."""

    backend: ClassVar[str] = BACKEND

    master_address: str
    master_port: int
    world_size: int
    seconds: float = 300.0


class GlooTrainerWeightTransferEngine(TrainerWeightTransferEngine[GlooTrainerInitInfo]):
    """The trainer's side: rank 0 sends, the other ranks only gather with it."""

    init_info_cls = GlooTrainerInitInfo
    _group: _Group | None = None

    @classmethod
    def trainer_init(
        cls, init_info: GlooTrainerInitInfo, *, client: Any, source: Any = None
    ) -> GlooTrainerWeightTransferEngine:
        engine = cls(client=client, source=source, is_sender=init_info.is_sender)
        if engine.is_sender:
            theirs = GlooInitInfo(
                init_info.master_address,
                init_info.master_port,
                rank_offset=1,
                world_size=init_info.world_size,
                seconds=init_info.seconds,
            )
            joined = in_thread(
                lambda: client.init_weight_transfer_engine(asdict(theirs)), name="join"
            )
            engine._group = _Group(theirs, 0)
            joined.result()
        return engine

    def send_weights(self) -> None:
        """Send the weights to all servers. All ranks call it."""
        if not self.is_sender:
            for _ in self.source:
                pass
            return
        shapes = self.source.metadata()
        update = GlooUpdateInfo(
            names=[weight.name for weight in shapes],
            dtype_names=[str(weight.dtype).removeprefix("torch.") for weight in shapes],
            shapes=[list(weight.shape) for weight in shapes],
        )
        self.client.start_weight_update()
        loaded = in_thread(lambda: self.client.update_weights(asdict(update)), name="update")
        self._send(loaded)
        loaded.result()
        self.client.finish_weight_update()

    def _send(self, loaded: Future[None]) -> None:
        assert self._group is not None
        for _, weight in self.source:
            sent = self._group.broadcast(weight.cpu())
            while not sent.is_completed():
                if loaded.done():
                    loaded.result()  # raises why a server takes no more
                time.sleep(_POLL_SECONDS)
            sent.wait()

    def shutdown(self) -> None:
        self._group = None


class _Group:
    """The trainer and all workers, as one of them sees it.

    Args:
        rank: that one's place in the group.
    """

    def __init__(self, info: GlooInitInfo, rank: int) -> None:
        self._timeout = timedelta(seconds=info.seconds)
        store = dist.TCPStore(  # type: ignore[attr-defined]
            info.master_address, info.master_port, info.world_size,
            is_master=rank == 0, timeout=self._timeout, multi_tenant=True,
        )  # fmt: skip
        self._gloo = compat.gloo_group(
            store, rank, info.world_size, _devices(info), self._timeout / _CONNECT_FACTOR
        )

    def broadcast(self, weight: torch.Tensor) -> Any:
        """Send a tensor from rank 0 to all, as bytes, since gloo does not know every dtype."""
        options = dist.BroadcastOptions()
        options.rootRank = options.rootTensor = 0
        options.timeout = self._timeout
        flat = weight.contiguous().view(-1)
        return self._gloo.broadcast([flat.view(torch.uint8)], options)


def _devices(info: GlooInitInfo) -> list[Any]:
    """Return the network devices at which this process is reached.

    They are those of ``GLOO_SOCKET_IFNAME``, or else that by which this machine reaches the
    trainer. gloo alone takes the address of the machine's name, which often is one of loopback.
    """
    create = dist.ProcessGroupGloo.create_device
    if names := os.environ.get("GLOO_SOCKET_IFNAME"):
        return [create(interface=name) for name in names.split(",")]
    return [create(hostname=_way_to(info.master_address, info.master_port))]


def _way_to(host: str, port: int) -> str:
    """Return the address of this machine from which it reaches a host."""
    family, kind, *_, place = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as way:
        way.connect(place)  # sends nothing: it is a datagram's
        return str(way.getsockname()[0])

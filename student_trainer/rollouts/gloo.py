"""Weight transfer to a vLLM server over gloo, for machines without GPUs.

vLLM 0.32 sends weights by NCCL, from GPU to GPU. This is the same by gloo: an engine for its
workers, which vLLM's plug-in interface registers, and one for the trainer.
"""

from __future__ import annotations

import time
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from vllm.distributed.utils import stateless_init_torch_distributed_process_group
from vllm.distributed.weight_transfer.base import (
    TrainerInitInfo,
    TrainerWeightTransferEngine,
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from student_trainer.runtime.threads import in_thread

BACKEND = "gloo"
_POLL_SECONDS = 1e-4


@dataclass
class GlooInitInfo(WeightTransferInitInfo):
    """The facts by which a vLLM worker joins the group.

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
    _group: Any = None

    def init_transfer_engine(self, init_info: GlooInitInfo) -> None:
        parallel = self.parallel_config
        worker = parallel.data_parallel_index * parallel.world_size + parallel.rank
        self.shutdown()
        self._group = _join(init_info, init_info.rank_offset + worker)

    def start_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        initialize_layerwise_reload(self.model)

    def finish_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)

    def receive_weights(self, update_info: GlooUpdateInfo) -> None:
        infos = zip(update_info.names, update_info.dtype_names, update_info.shapes, strict=True)
        try:
            for name, dtype, shape in infos:
                weight = torch.empty(shape, dtype=getattr(torch, dtype))
                _broadcast(self._group, weight).wait()
                self.model.load_weights([(name, weight.to(self.device))])
        except BaseException:
            self.shutdown()  # closes the connections, so that nobody waits for this worker
            raise

    def shutdown(self) -> None:
        self._group = None


@dataclass
class GlooTrainerInitInfo(TrainerInitInfo):
    """The facts by which the trainer sends; see `GlooInitInfo`."""

    backend: ClassVar[str] = BACKEND

    master_address: str
    master_port: int
    world_size: int
    seconds: float = 300.0


class GlooTrainerWeightTransferEngine(TrainerWeightTransferEngine[GlooTrainerInitInfo]):
    """The trainer's side: rank 0 sends, the other ranks only gather with it."""

    init_info_cls = GlooTrainerInitInfo
    _group: Any = None

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
            engine._group = _join(theirs, 0)
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
        for _, weight in self.source:
            sent = _broadcast(self._group, weight.cpu())
            while not sent.is_completed():
                if loaded.done():
                    loaded.result()  # raises why a server takes no more
                time.sleep(_POLL_SECONDS)
            sent.wait()

    def shutdown(self) -> None:
        self._group = None


def _join(info: GlooInitInfo, rank: int) -> Any:
    return stateless_init_torch_distributed_process_group(
        info.master_address,
        info.master_port,
        rank,
        info.world_size,
        backend="gloo",
        timeout=timedelta(seconds=info.seconds),
    )


def _broadcast(group: Any, weight: torch.Tensor) -> Any:
    """Send a tensor from rank 0 to all, as bytes, since gloo does not know every dtype."""
    options = dist.BroadcastOptions()
    options.rootRank = options.rootTensor = 0
    flat = weight.contiguous().view(-1)
    return group.broadcast([flat.view(torch.uint8)], options)

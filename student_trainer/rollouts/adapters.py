"""A student's adapters on their way to rollout servers, without the base model they change.

vLLM loads adapters while it runs (``/v1/load_lora_adapter``), but only from a folder that it sees.
So `shared.vllm_adapters`, in the server's workers, takes the files over HTTP and writes them there.
Each version has a name of its own, by which completions are asked for. vLLM's prefix cache knows
adapters by name, so nothing of an older version is used again.
"""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Iterable
from functools import partial
from typing import Any

import httpx
import torch
from peft import PeftType
from peft.tuners.lora import Linear
from safetensors.torch import save
from torch import nn

from shared.errors import RolloutError
from shared.vllm_adapters import ReceivedAdapters
from student_trainer.rollouts.http import ServerOptions, at_once, content
from student_trainer.rollouts.transfer import ServerControl
from student_trainer.rollouts.weights import StudentWeights, full, gathered

EXTENSION = f"{ReceivedAdapters.__module__}.{ReceivedAdapters.__qualname__}"
_PART_BYTES = 12 << 20  # of a request; base64 makes 16 MiB of it
_ASK_SECONDS = 60.0  # a server collects what it says of itself in several seconds, once
_UNSUPPORTED = {
    "use_dora": "DoRA",
    "lora_bias": "lora_bias",
    "modules_to_save": "modules_to_save",
    "target_parameters": "target_parameters",
    "trainable_token_indices": "trainable_token_indices",
    "layer_replication": "layer_replication",
    "alora_invocation_tokens": "aLoRA",
}


class StudentAdapters:
    """The adapters of a student, as PEFT saves them.

    Args:
        model: the student, as it is called in training.
        weights: its weights, for their names in a checkpoint.
        dtype: dtype of the tensors that are sent.

    Attributes:
        obstacle: why they cannot go alone; None if they can.
        rank: the largest of their ranks.
    """

    def __init__(self, model: Any, weights: StudentWeights, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._layers = dict(weights.adapted)
        self._name = ""
        self.rank = 0
        self.obstacle = self._find_obstacle(model, weights)
        if self.obstacle is None:
            self._config = model.peft_config[self._name]
            self.rank = max(layer.r[self._name] for layer in self._layers.values())

    @property
    def config(self) -> str:
        """The content of ``adapter_config.json`` that vLLM reads."""
        names = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
        found = {name: getattr(self._config, name) for name in names}
        targets = sorted({name.rpartition(".")[2] for name in self._layers})
        return json.dumps({**found, "peft_type": "LORA", "bias": "none", "target_modules": targets})

    @torch.no_grad()
    def file(self) -> bytes:
        """Return the content of ``adapter_model.safetensors``.

        Of a sharded student all ranks call it together, because gathering is a collective.
        """
        tensors: dict[str, torch.Tensor] = {}
        for name, layer in self._layers.items():
            pair = {kind: getattr(layer, kind)[self._name].weight for kind in ("lora_A", "lora_B")}
            with gathered(list(pair.values())):
                for kind, weight in pair.items():
                    key = f"base_model.model.{name}.{kind}.weight"
                    whole = full(weight).detach()
                    tensors[key] = whole.to("cpu", self._dtype, copy=True).contiguous()
        return save(tensors)

    def _find_obstacle(self, model: Any, weights: StudentWeights) -> str | None:
        configs = getattr(model, "peft_config", {})
        active = {name for layer in self._layers.values() for name in layer.active_adapters}
        if len(active) != 1:
            return "several adapters are active"
        (self._name,) = active
        config = configs.get(self._name)
        if config is None or config.peft_type != PeftType.LORA:
            return "they are no LoRA adapters"
        for option, what in _UNSUPPORTED.items():
            if getattr(config, option, None):
                return f"vLLM does not load adapters with {what}"
        if config.bias != "none":
            return f"vLLM does not load adapters with bias {config.bias!r}"
        trained = _trained_base_weight(model)
        if trained is not None:
            return f"{trained} is trained too"
        named = {weight.name for weight in weights.shapes()}
        for name, layer in self._layers.items():
            if type(layer) is not Linear or type(layer.base_layer) is not nn.Linear:
                return f"{name} is no linear layer"
            if self._name not in layer.r:
                return f"{name} has no adapter"
            if f"{name}.weight" not in named:
                return f"a checkpoint names {name} otherwise"
        return None


def _trained_base_weight(model: Any) -> str | None:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ".lora_" not in name:
            return str(name)
    return None


def servers_obstacle(urls: Iterable[str], options: ServerOptions, rank: int) -> str | None:
    """Return why one of the servers loads no adapters of this rank; None if all do.

    They are asked at once. A server that does not answer is one that does not load any.
    """
    found = at_once([partial(_server_obstacle, url, options, rank) for url in urls])
    return next((one for one in found if one is not None), None)


def _server_obstacle(url: str, options: ServerOptions, rank: int) -> str | None:
    try:
        answer = content(
            httpx.get(
                f"{url}/server_info?config_format=json",
                headers=options.headers,
                timeout=_ASK_SECONDS,
            )
        )
        config, environment = answer["vllm_config"], answer["vllm_env"]
        lora, extension = (
            config["lora_config"],
            config["parallel_config"]["worker_extension_cls"],
        )
        if not lora:
            return f"{url} was started without --enable-lora"
        if lora["max_lora_rank"] < rank:
            return f"{url} was started with --max-lora-rank {lora['max_lora_rank']}, below {rank}"
        if not environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"]:
            return f"{url} was started without VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"
        if extension != EXTENSION:
            return f"{url} was started without --worker-extension-cls {EXTENSION}"
    except (httpx.HTTPError, RolloutError, KeyError, TypeError) as error:
        return f"{url} does not tell whether it loads adapters: {error!r}"
    return None


def send_adapter(
    control: ServerControl, file: bytes, config: str, *, run: str, name: str, before: str | None
) -> str | None:
    """Send an adapter to all servers, and let them load it; return why they cannot, or None.

    Args:
        control: the servers, which have its base model.
        file, config: its weights and configuration, see `StudentAdapters`.
        run: name of the run, by which older versions are deleted.
        name: name of the version.
        before: name of the version before it, which is dropped.

    Raises:
        RolloutError: a server failed.
    """
    control.pause()
    for offset in range(0, len(file), _PART_BYTES):
        part = b64encode(file[offset : offset + _PART_BYTES]).decode()
        control.call_workers("receive_adapter", offset=offset, part=part)
    written = control.call_workers("write_adapter", run=run, version=name, config=config)
    for old in {before, name} - {None}:  # the name too, if a transfer of it was cut off
        control.unload_adapter(str(old))
    refusal = control.load_adapter(name, [str(folders[0]) for folders in written])
    if refusal is None:
        for url, workers in zip(
            control.urls, control.call_workers("unused_adapter_modules"), strict=True
        ):
            unused = set.intersection(*map(set, workers))  # a pipeline's stages have their own
            if unused:
                refusal = f"{url} has no {min(unused)} that an adapter can change"
    if refusal is None:
        control.name_weights(name)
    control.resume()
    return refusal

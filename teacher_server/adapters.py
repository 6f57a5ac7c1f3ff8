"""The LoRA adapters that one base model serves as teachers of their own, read before it loads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.errors import ConfigurationError
from shared.printable import one_line

_WEIGHTS = "adapter_model.safetensors"
_LONGEST_NAME = 200  # characters
_NOTHING: tuple[Any, ...] = (None, False, [], {})
# Fields by which an adapter changes more than linear layers, each with the values that do not.
# PiSSA, OLoRA and the like change the base's own weights, which all models of a server share.
_BESIDE_LORA: dict[str, tuple[Any, ...]] = {
    "modules_to_save": _NOTHING,
    "use_dora": _NOTHING,
    "lora_bias": _NOTHING,
    "trainable_token_indices": _NOTHING,
    "layer_replication": _NOTHING,
    "bias": (None, "none"),
    "init_lora_weights": (None, True, False, "gaussian", "eva", "orthogonal"),
}


@dataclass(frozen=True)
class LoraModule:
    """An adapter of ``--lora-modules``: the name that requests call it by, and its folder."""

    name: str
    path: str


def lora_modules(values: Sequence[str], base: str) -> tuple[LoraModule, ...]:
    """Return the adapters of ``--lora-modules NAME=DIR …``; as in vLLM each may be JSON instead.

    Args:
        base: the base model's name, which no adapter may have.

    Raises:
        ConfigurationError: a value is not NAME=DIR, a name stands twice, or a folder holds no LoRA
            adapter that can be served beside others.
    """
    modules = tuple(_parsed(value, base) for value in values)
    names = [base]
    for module in modules:
        given = f"--lora-modules {module.name}={module.path}"
        if not module.name.isprintable() or len(module.name) > _LONGEST_NAME:
            raise ConfigurationError(
                f"{one_line(given, 300)}: a name has at most {_LONGEST_NAME} characters, none of "
                "them a control character"
            )
        if module.name in names:
            raise ConfigurationError(f"{given}: two models would be called {module.name}")
        names.append(module.name)
        _check_folder(given, Path(module.path))
    return modules


def _parsed(value: str, base: str) -> LoraModule:
    fields: Any
    if value.startswith("{"):
        try:
            fields = json.loads(value)
        except json.JSONDecodeError as error:
            raise ConfigurationError(f"--lora-modules {value}: not JSON: {error}") from error
        if not {"name", "path"} <= fields.keys() <= {"name", "path", "base_model_name"}:
            raise ConfigurationError(
                f"--lora-modules {value}: give name and path, and at most base_model_name beside"
            )
        if fields.get("base_model_name", base) != base:
            raise ConfigurationError(
                f"--lora-modules {value}: base_model_name is not {base!r}, the model served here"
            )
        name, path = str(fields["name"]), str(fields["path"])
    else:
        name, _, path = value.partition("=")
    if not name.strip() or not path:
        raise ConfigurationError(f"--lora-modules {value}: give NAME=DIR, such as math=runs/math")
    return LoraModule(name, path)


def _check_folder(given: str, folder: Path) -> None:
    """Refuse a folder without a LoRA adapter whose effect is within the model's linear layers."""
    if not folder.is_dir():
        raise ConfigurationError(f"{given}: no such folder; give one with adapter_config.json")
    file = folder / "adapter_config.json"
    if not file.is_file():
        raise ConfigurationError(f"{given}: the folder has no adapter_config.json")
    try:
        config = json.loads(file.read_text())
        kind = config.get("peft_type")
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigurationError(f"{given}: {file} is damaged: {error}") from error
    if not (folder / _WEIGHTS).is_file():
        raise ConfigurationError(
            f"{given}: the folder has no {_WEIGHTS}; save the adapter as safetensors"
        )
    merge = f"merge it (student-trainer merge --model_name_or_path {folder}) and serve it alone"
    if kind != "LORA":
        raise ConfigurationError(f"{given} is a {kind} adapter; only LORA is served: {merge}")
    if not _ranks_of(config):
        raise ConfigurationError(
            f"{given}: {file} has no rank: r is {config.get('r')!r}, rank_pattern "
            f"{config.get('rank_pattern')!r}; give a file as PEFT saved it, with r from 1"
        )
    for name, harmless in _BESIDE_LORA.items():
        if config.get(name) not in harmless:
            raise ConfigurationError(
                f"{given} has {name} {config[name]}, which adapters served together cannot have: "
                f"{merge}"
            )


def adapter_rank(module: LoraModule) -> int:
    """Return the largest rank r of an adapter's layers."""
    config = json.loads((Path(module.path) / "adapter_config.json").read_text())
    return max(_ranks_of(config))


def _ranks_of(config: dict[str, Any]) -> list[int]:
    """Return the ranks of an adapter's layers; none where one of them is no whole number from 1."""
    pattern = config.get("rank_pattern") or {}
    ranks = [config.get("r"), *(pattern.values() if isinstance(pattern, dict) else [None])]
    return ranks if all(type(rank) is int and rank > 0 for rank in ranks) else []


def adapter_targets(module: LoraModule) -> list[str]:
    """Return the last names of the layers that an adapter changes, such as q_proj, sorted.

    They are read from its weights, because its configuration may hold a pattern.
    """
    from safetensors import safe_open

    with safe_open(Path(module.path) / _WEIGHTS, framework="numpy") as file:
        keys = list(file.keys())
    return sorted({key.split(".lora_")[0].rsplit(".", 1)[-1] for key in keys if ".lora_" in key})

"""The LoRA adapters beside a transformers model, which share its weights and its batches."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch

from shared.errors import ConfigurationError
from shared.identity import adapter_fingerprint
from shared.protocol import TeacherIdentity
from teacher_server.adapters import LoraModule, adapter_targets
from teacher_server.backends.compat import mixed_adapters
from teacher_server.backends.probe import same_states

logger = logging.getLogger(__name__)

_TOKENS = 8  # of the sequences that are probed


def adapter_identities(
    base: TeacherIdentity, modules: Sequence[LoraModule]
) -> tuple[TeacherIdentity, ...]:
    """Return the identity of each adapter: its name, and a fingerprint of base and adapter."""
    return tuple(
        base.model_copy(
            update={
                "model": module.name,
                "fingerprint": adapter_fingerprint(base.fingerprint, Path(module.path)),
            }
        )
        for module in modules
    )


def check_targets(modules: Sequence[LoraModule]) -> None:
    """Refuse adapters of the embedding or the output layer, which all models of a server share.

    Raises:
        ConfigurationError: names the adapter and the layer.
    """
    for module in modules:
        shared = {"lm_head", "embed_tokens"} & set(adapter_targets(module))
        if shared:
            raise ConfigurationError(
                f"--lora-modules {module.name}={module.path} changes {min(shared)}, which adapters "
                "served together share; merge it (student-trainer merge) and serve it alone"
            )


class Adapters:
    """The adapters of a model, by name; None is the base model alone.

    They are loaded into the model's linear layers. A forward pass may mix them where a probe has
    shown that each sequence then gets its own adapter; else it holds one.

    Args:
        model: the base model, changed in place.
        modules: may be empty.

    Raises:
        ConfigurationError: an adapter does not fit the model, or some of its weights do not.
    """

    def __init__(self, model: Any, modules: Sequence[LoraModule]) -> None:
        self._peft: Any = None
        self._mixes = True
        # PEFT takes no name with a dot, nor "keys", and reads "__base__" as no adapter.
        self._names = {module.name: f"served_{number}" for number, module in enumerate(modules)}
        check_targets(modules)
        for module in modules:
            self._load(model, module)

    def _load(self, model: Any, module: LoraModule) -> None:
        from peft import PeftModel
        from peft.tuners.tuners_utils import BaseTunerLayer

        given, name = f"--lora-modules {module.name}={module.path}", self._names[module.name]
        try:
            if self._peft is None:
                self._peft = PeftModel.from_pretrained(model, module.path, adapter_name=name)
            # The first is loaded twice, since only this tells which weights found no layer.
            loaded = self._peft.load_adapter(module.path, adapter_name=name)
            self._peft.eval()
        except Exception as error:  # whatever an adapter's files can cause
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ConfigurationError(f"{given} does not fit this model: {reason:.500}") from error
        if unfit := sorted([*loaded.missing_keys, *loaded.unexpected_keys]):
            raise ConfigurationError(
                f"{given} does not fit this model: {len(unfit)} weights are missing or belong to "
                f"no layer of it, {unfit[0]} among them; give an adapter of this model"
            )
        if isinstance(model.get_output_embeddings(), BaseTunerLayer):  # whatever its name is
            raise ConfigurationError(
                f"{given} changes the output layer, which adapters served together share; merge it "
                "(student-trainer merge) and serve it alone"
            )

    @torch.inference_mode()
    def probe(self, states: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype) -> None:
        """Find out whether a batch may mix adapters, by what each makes of a sequence alone.

        Args:
            states: computes the head's inputs [B, L, d] of input ids [B, L].
        """
        if self._peft is None:
            return
        names = [None, *self._names]
        ids = torch.arange(_TOKENS, device=self._peft.device)[None] + 1  # [1, L]
        alone = []
        for name in names:
            with self._one(name):
                alone.append(states(ids)[0])
        try:
            with self._mixed(names):
                together = states(ids.repeat(len(names), 1))
        except (TypeError, ValueError, RuntimeError, IndexError) as error:
            self._mixes = False
            logger.warning("Adapters take turns instead of sharing batches: %s", error)
            return
        pairs = zip(alone, together, strict=True)
        self._mixes = all(same_states(found, one, dtype) for one, found in pairs)
        if not self._mixes:
            logger.warning("Adapters take turns instead of sharing batches: this model mixes rows")

    def groups(self, names: Sequence[str | None]) -> list[list[int]]:
        """Return groups of sequences, by index, that one forward pass may hold."""
        if self._peft is None or self._mixes:
            return [list(range(len(names)))]
        by_name: dict[str | None, list[int]] = {}
        for index, name in enumerate(names):
            by_name.setdefault(name, []).append(index)
        return list(by_name.values())

    @contextmanager
    def active(self, names: Sequence[str | None]) -> Iterator[None]:
        """Give each sequence of a batch its adapter, inside the ``with`` block."""
        if self._peft is None:
            yield
        elif self._mixes:
            with self._mixed(names):
                yield
        else:
            [name] = set(names)
            with self._one(name):
                yield

    def _mixed(self, names: Sequence[str | None]) -> AbstractContextManager[None]:
        own = [None if name is None else self._names[name] for name in names]
        return mixed_adapters(self._peft, own)

    @contextmanager
    def _one(self, name: str | None) -> Iterator[None]:
        if name is None:
            with self._peft.disable_adapter():
                yield
        else:
            self._peft.set_adapter(self._names[name], inference_mode=True)
            yield

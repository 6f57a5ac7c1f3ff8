"""The student's weights on their way to an engine on this machine: a file for each layer."""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file

from student_trainer.model.merging import adapts_tied_weights
from student_trainer.rollouts.weights import StudentWeights
from student_trainer.runtime.signals import signals_as_exits

_SHARED_MEMORY = Path("/dev/shm")


class LayerFiles:
    """A folder with the student's config.json and, during `send`, the weights of one layer.

    It is in shared memory where a layer fits there.
    """

    def __init__(self, weights: StudentWeights) -> None:
        self._weights = weights
        self._folder = tempfile.TemporaryDirectory(
            prefix="student-weights-", dir=_folder_for(weights)
        )
        self.path = Path(self._folder.name)

    def close(self) -> None:
        """Delete the folder."""
        self._folder.cleanup()

    def write_config(self) -> None:
        """Write the student's config as a checkpoint has it."""
        causal_lm = self._weights.causal_lm
        config = copy.deepcopy(causal_lm.config)
        config.architectures = [type(causal_lm).__name__]
        if adapts_tied_weights(causal_lm):
            for part in (config, config.get_text_config()):
                part.tie_word_embeddings = False
        config.save_pretrained(self.path)

    def send(self, load: Callable[[Path], None] | None) -> None:
        """Gather the weights one layer at a time, and give ``load`` the file of each.

        All ranks that share the student call it together. If ``load`` fails on one, it still
        gathers to the end, as other ranks gather with it.

        Args:
            load: reads the file, which is deleted after it; None where there is no engine.
        """
        layers = self._weights.layers()
        try:
            for layer in layers:
                if load is not None:
                    with self._written(layer) as file:
                        load(file)
        finally:
            for _ in layers:
                pass

    @contextmanager
    def _written(self, layer: Mapping[str, torch.Tensor]) -> Iterator[Path]:
        """Write a layer into a file, and delete it after the block; also on a signal."""
        file = self.path / "layer.safetensors"
        with signals_as_exits():
            try:
                save_file({name: w.cpu().contiguous() for name, w in layer.items()}, file)
                yield file
            finally:
                file.unlink(missing_ok=True)


def _folder_for(weights: StudentWeights) -> Path | None:
    """Return the shared-memory folder if a layer fits there, or None for the default folder.

    Containers often have 64 MB. All ranks of this machine send weights at the same time, and a
    worker may hold two layers.
    """
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    needed = 2.2 * ranks * weights.largest_layer
    if _SHARED_MEMORY.is_dir() and shutil.disk_usage(_SHARED_MEMORY).free > needed:
        return _SHARED_MEMORY
    return None

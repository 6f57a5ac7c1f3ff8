"""The methods that a worker of the vLLM engine beside the trainer gets from here."""

from __future__ import annotations

from typing import Any

from safetensors.torch import load_file

from shared.vllm_sampling import SeededSampling


class StudentWorker(SeededSampling):
    """A worker extension (``worker_extension_cls``) that loads the student's weights by layer.

    vLLM's own ``reload_weights`` reads a whole checkpoint. The calls here take its steps one at a
    time; under tensor parallelism each worker cuts its part out of every weight.
    """

    def begin_weights(self) -> None:
        """Make the model ready for new weights."""
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        runner: Any = self.model_runner  # type: ignore[attr-defined]
        initialize_layerwise_reload(runner.get_model())

    def load_weights_of(self, path: str) -> None:
        """Load the weights of a safetensors file, which may be deleted then."""
        runner: Any = self.model_runner  # type: ignore[attr-defined]
        runner.get_model().load_weights(load_file(path).items())

    def finish_weights(self) -> None:
        """Make the model ready to generate with its new weights."""
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        runner: Any = self.model_runner  # type: ignore[attr-defined]
        finalize_layerwise_reload(runner.get_model(), runner.model_config)

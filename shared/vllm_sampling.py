"""A vLLM worker extension that keeps seeded sampling on a CPU from ending the engine."""

from __future__ import annotations

from typing import Any

import numpy as np


class SeededSampling:
    """A worker extension (``--worker-extension-cls``) that makes seeded sampling work on a CPU.

    vLLM samples after every piece of a prompt that is prefilled in several, discards all but the
    last token, and winds the request's generator back by an offset. A CPU's generator has none: it
    raises, and the engine dies. Here such requests are sampled without their generator, so nothing
    is wound back.
    """

    def spare_generators(self) -> None:
        """Hook the model runner on a CPU; do nothing where generators have offsets."""
        runner: Any = self.model_runner  # type: ignore[attr-defined]
        if runner.device.type != "cpu":
            return
        sample_tokens = runner.sample_tokens

        def sample(*arguments: Any, **options: Any) -> Any:
            batch = runner.input_batch
            discarded = np.flatnonzero(runner.discard_request_mask.np[: batch.num_reqs])
            spared = {i: batch.generators.pop(i) for i in discarded if i in batch.generators}
            try:
                return sample_tokens(*arguments, **options)
            finally:
                batch.generators.update(spared)

        runner.sample_tokens = sample

"""Mixed into vLLM's worker by ``--worker-extension-cls``; imports no vllm."""

from __future__ import annotations

from typing import Any

import numpy as np


class SeededSampling:
    """Seeded completions on a CPU, where vLLM's own end the engine.

    vLLM samples after every piece of a prompt that is prefilled in several, throws all but the last
    token away, and winds the request's generator back by an offset. A CPU's generator has none: it
    raises, and the engine is dead. Here such rows are sampled without their generator, so there is
    nothing to wind back.
    """

    def spare_generators(self) -> None:
        """Hook the model runner; where generators have offsets there is nothing to do."""
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

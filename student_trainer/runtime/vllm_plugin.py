"""The plug-in that makes weight transfer over gloo known to vLLM's processes."""

from contextlib import suppress


def register() -> None:
    """Register the engines of `student_trainer.rollouts.gloo`, which are imported when used.

    vLLM calls it in each of its processes, through the entry point in ``vllm.general_plugins``, and
    may call it twice.
    """
    from vllm.distributed.weight_transfer import factory

    module = "student_trainer.rollouts.gloo"
    with suppress(ValueError):  # registered already
        factory.WeightTransferEngineFactory.register_engine(
            "gloo", module, "GlooWeightTransferEngine"
        )
        factory.WeightTransferTrainerFactory.register_engine(
            "gloo", module, "GlooTrainerWeightTransferEngine"
        )

"""The checks of the engine that writes the student's completions."""

from __future__ import annotations

import importlib.util

from shared.errors import ConfigurationError
from student_trainer.config.arguments import (
    AdapterArguments,
    DistillFlags,
    EvaluateArguments,
    uses_deepspeed,
    uses_fsdp,
)
from student_trainer.config.checks.presence import check_needs


def check_rollouts(args: DistillFlags, adapters: AdapterArguments) -> None:
    """Check the flags of --rollout_engine vllm.

    Raises:
        ConfigurationError: it is not installed, or a combination cannot work.
    """
    check_engine(args)
    if args.rollout_engine != "vllm":
        return
    if args.lmbda == 0:
        raise ConfigurationError(
            "--rollout_engine vllm has no effect with --lmbda 0: the student writes nothing"
        )
    if not 0.01 <= args.rollout_temperature <= 2:
        raise ConfigurationError(
            f"--rollout_temperature {args.rollout_temperature}: vLLM samples from 0.01 to 2; use "
            "--rollout_engine transformers"
        )
    if adapters.load_in_4bit:
        raise ConfigurationError(
            "--rollout_engine vllm takes no 4-bit weights; drop --load_in_4bit, or use transformers"
        )
    if uses_fsdp(args) or uses_deepspeed(args):
        raise ConfigurationError(
            "--rollout_engine vllm needs whole weights on each rank; drop --fsdp and --deepspeed, "
            "or use transformers"
        )


def check_engine(args: DistillFlags | EvaluateArguments) -> None:
    check_needs(args)
    if args.rollout_engine != "vllm":
        return
    share = args.vllm_gpu_memory_utilization
    if importlib.util.find_spec("vllm") is None:
        raise ConfigurationError("--rollout_engine vllm: not installed; pip install '.[vllm]'")
    if not 0 < share < 1:
        raise ConfigurationError(f"--vllm_gpu_memory_utilization {share} must be between 0 and 1")

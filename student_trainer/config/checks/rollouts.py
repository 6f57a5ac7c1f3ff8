"""The checks of the engine that writes the student's completions."""

from __future__ import annotations

import importlib.util
import os

from shared.address import server_address
from shared.errors import ConfigurationError
from student_trainer.config.arguments import (
    AdapterArguments,
    DistillFlags,
    DivergenceFlags,
    EvaluateArguments,
)
from student_trainer.config.checks.presence import check_needs
from student_trainer.config.checks.teacher import key_of


def check_rollouts(args: DistillFlags, adapters: AdapterArguments) -> None:
    """Check how completions are sampled, and the flags of --rollout_engine and --rollout_url.

    Raises:
        ConfigurationError: vLLM is not installed, or a combination cannot work.
    """
    check_engine(args)
    _check_token_filter(args)
    _check_generations(args)
    if args.rollout_url:
        _check_servers(args)
    elif args.rollout_engine != "vllm":
        return
    engine = "--rollout_url" if args.rollout_url else "--rollout_engine vllm"
    if args.lmbda == 0:
        raise ConfigurationError(
            f"{engine} has no effect with --lmbda 0: the student writes nothing"
        )
    if not 0.01 <= args.rollout_temperature <= 2:
        raise ConfigurationError(
            f"--rollout_temperature {args.rollout_temperature}: vLLM samples from 0.01 to 2; use "
            "--rollout_engine transformers"
        )
    if adapters.load_in_4bit:
        raise ConfigurationError(
            f"{engine} takes no 4-bit weights; drop --load_in_4bit, or use transformers"
        )
    if not args.rollout_url:
        _check_beside(args)


def _check_beside(args: DistillFlags) -> None:
    """Check the flags of an engine that shares the GPUs of the student."""
    size, ranks = args.vllm_tensor_parallel_size, _local_ranks()
    if size < 1 or ranks % size:
        raise ConfigurationError(
            f"--vllm_tensor_parallel_size {size} must divide the processes of each machine, here "
            f"{ranks}; start them with torchrun or accelerate launch"
        )
    if args.vllm_enable_sleep_mode and args.rollout_staleness:
        raise ConfigurationError(
            f"--vllm_enable_sleep_mode frees no memory with --rollout_staleness "
            f"{args.rollout_staleness}: the engine writes while the student trains; drop one"
        )


def _local_ranks() -> int:
    """Return the number of this run's processes on this machine, as its launcher names it."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or 1)


def _check_token_filter(args: DistillFlags) -> None:
    """Check the flags that leave out tokens before one is drawn."""
    if not 0 < args.rollout_top_p <= 1:
        raise ConfigurationError(
            f"--rollout_top_p {args.rollout_top_p} must be above 0, and 1 (off) or below"
        )
    if args.rollout_top_k < 0:
        raise ConfigurationError(
            f"--rollout_top_k {args.rollout_top_k} must be 0 (off) or a number of tokens"
        )
    if not 0 <= args.rollout_min_p <= 1:
        raise ConfigurationError(f"--rollout_min_p {args.rollout_min_p} must be from 0 (off) to 1")
    for name in ("rollout_top_p", "rollout_top_k", "rollout_min_p"):
        value = getattr(args, name)
        if args.lmbda == 0 and value != getattr(DistillFlags, name):
            raise ConfigurationError(
                f"--{name} {value} has no effect with --lmbda 0: the student writes nothing. "
                "Drop it"
            )


def _check_generations(args: DistillFlags) -> None:
    """Check the number of completions of a prompt."""
    count = args.num_generations
    if count < 1:
        raise ConfigurationError(f"--num_generations {count} must be at least 1")
    if count == 1:
        return
    if args.lmbda < 1:
        raise ConfigurationError(
            f"--num_generations {count} needs --lmbda 1, and it is {args.lmbda:g}: only the "
            "student writes several completions of a prompt, so a step of another's would learn "
            f"the same {count} times. Give --lmbda 1, or drop it"
        )
    size, substeps = args.per_device_train_batch_size, args.gradient_accumulation_steps
    if size * substeps % count:
        raise ConfigurationError(
            f"--num_generations {count} does not divide the {size * substeps} completions that a "
            f"process learns in a step (--per_device_train_batch_size {size} x "
            f"--gradient_accumulation_steps {substeps}); give a divisor, or change these"
        )


def _check_servers(args: DistillFlags) -> None:
    """Check the flags of ``--rollout_url``."""
    if args.rollout_engine == "vllm":
        raise ConfigurationError(
            "--rollout_url and --rollout_engine vllm both write the student's completions; drop one"
        )
    rollout_addresses(args)
    if importlib.util.find_spec("vllm") is None:
        raise ConfigurationError(
            "--rollout_url: weights are sent by vLLM, which is not installed here; "
            "pip install 'sparse-gkd[vllm]'"
        )
    if not args.rollout_timeout > 0:
        raise ConfigurationError(f"--rollout_timeout {args.rollout_timeout} must be above 0")
    tokens = args.rollout_max_tokens_in_flight
    if tokens is not None and tokens < 1:
        raise ConfigurationError(f"--rollout_max_tokens_in_flight {tokens} must be at least 1")
    rollout_key_of(args)


def rollout_addresses(args: DivergenceFlags) -> tuple[str, ...]:
    """Return the addresses of the rollout servers, without a slash at their end.

    Raises:
        ConfigurationError: one is no address, is there twice, or holds a user or a password.
    """
    urls = args.rollout_url or []
    if any("@" in url for url in urls):  # the message must not show the password
        raise ConfigurationError(
            "--rollout_url holds a user or a password, which every log would show; give a key by "
            "the environment variable ROLLOUT_API_KEY or by --rollout_api_key_file"
        )
    addresses = tuple(server_address(url, "--rollout_url") for url in urls)
    for url in addresses:
        if addresses.count(url) > 1:
            raise ConfigurationError(f"--rollout_url {url} is given twice; give it once")
    return addresses


def rollout_key_of(args: DivergenceFlags) -> str | None:
    """Return the key of the rollout servers, from a file or else from the environment."""
    return key_of(args.rollout_api_key_file, "--rollout_api_key_file", "ROLLOUT_API_KEY")


def check_engine(args: DistillFlags | EvaluateArguments) -> None:
    check_needs(args)
    if args.rollout_engine != "vllm":
        return
    share = args.vllm_gpu_memory_utilization
    if importlib.util.find_spec("vllm") is None:
        raise ConfigurationError(
            "--rollout_engine vllm: not installed; pip install 'sparse-gkd[vllm]'"
        )
    if not 0 < share < 1:
        raise ConfigurationError(f"--vllm_gpu_memory_utilization {share} must be between 0 and 1")

"""The start of vLLM's engine: its flags, its process, and what it says of the model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NoReturn, get_args

from transformers import AutoConfig, GenerationConfig

from shared.errors import ConfigurationError
from shared.identity import model_fingerprint, tokenizer_identity
from shared.protocol import Capabilities, TeacherIdentity
from teacher_server.adapters import LoraModule, adapter_rank, adapter_targets
from teacher_server.backends.adapters import adapter_identities, check_targets
from teacher_server.backends.base import BackendFacts
from teacher_server.backends.checkpoint import (
    eos_token_ids,
    from_pretrained,
    local_folder,
)
from teacher_server.backends.vllm_worker import ScoringExtension
from teacher_server.settings import DtypeName, Settings

_EXTENSION = f"{ScoringExtension.__module__}.{ScoringExtension.__qualname__}"


def engine_arguments(settings: Settings) -> Any:
    """Return vLLM's `AsyncEngineArgs`: this server's, then the flags under vLLM's own names.

    Raises:
        ConfigurationError: a flag that vLLM does not know, or refuses.
    """
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    # As `vllm serve` does; `teacher_server.orphans` needs processes that import the main module
    # again.
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.platforms import current_platform
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    class Parser(FlexibleArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise ConfigurationError(f"vLLM's engine flags: {message}")

    device = current_platform.device_type
    if settings.device not in ("auto", device):
        raise ConfigurationError(
            f"--device {settings.device}: the vLLM installed here is built for {device}"
        )
    flags = [
        *("--model", settings.model, "--dtype", _dtype(settings)),
        *("--max-num-batched-tokens", str(settings.max_batch_tokens)),
        *("--max-logprobs", str(settings.max_top_k)),
        "--skip-tokenizer-init",
        *("--scheduling-policy", "priority"),  # clients take turns
    ]  # fmt: skip
    if settings.max_model_len is not None:
        flags += ["--max-model-len", str(settings.max_model_len)]
    if settings.trust_remote_code:
        flags += ["--trust-remote-code"]
    flags += _adapter_flags(settings, device)
    if device == "cpu":
        # A teacher on CPU is for trying things out, so it does not compile for minutes, and its
        # cache does not claim nearly all memory.
        flags += ["--enforce-eager"]
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        # Nor does the sampler, which would compile one small function for ten seconds.
        os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
        # Scoring makes 128 MiB of logits again and again. By default glibc returns them to the
        # system each time, and page faults then take as long as all of the arithmetic.
        os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(1 << 30))
        os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(1 << 30))
    for flag in settings.engine_flags:
        if flag.split("=")[0].replace("_", "-") == "--worker-extension-cls":
            raise ConfigurationError(f"{flag} is set by this server; leave it out")
    parser = AsyncEngineArgs.add_cli_args(Parser(prog="vllm", add_help=False))
    parsed = parser.parse_args([*flags, *settings.engine_flags])
    arguments = AsyncEngineArgs.from_cli_args(parsed)
    arguments.worker_extension_cls = _EXTENSION
    return arguments


def _adapter_flags(settings: Settings, device: str) -> list[str]:
    """Return the engine's flags for ``--lora-modules``; none without adapters.

    Layers that no adapter changes keep their kernels, the output layer among them, whose LoRA code
    takes one position a sequence and no vocabulary above 258,048.
    """
    modules = settings.adapters
    if not modules:
        return []
    from vllm.config.lora import MaxLoRARanks

    check_targets(modules)
    rank = max(map(adapter_rank, modules))
    ranks = [one for one in get_args(MaxLoRARanks) if one >= rank]
    if not ranks:
        raise ConfigurationError(
            f"an adapter of --lora-modules has rank {rank}, and vLLM takes ranks up to "
            f"{max(get_args(MaxLoRARanks))}; merge it (student-trainer merge) and serve it alone"
        )
    targets = sorted({target for module in modules for target in adapter_targets(module)})
    # vLLM's CPU code gives a sequence without an adapter the last slot, so that one stays empty.
    slots = len(modules) + (device == "cpu")
    return [
        "--enable-lora",
        *("--max-loras", str(slots), "--max-lora-rank", str(min(ranks))),
        *("--lora-target-modules", *targets),
    ]


def _dtype(settings: Settings) -> str:
    """Return the engine's dtype; for ``auto`` the checkpoint's, as vLLM would halve float32."""
    if settings.dtype != "auto":
        return settings.dtype
    trust = {"trust_remote_code": settings.trust_remote_code}
    config = from_pretrained(AutoConfig, settings.model, **trust).get_text_config()
    stored = str(getattr(config, "dtype", None)).removeprefix("torch.")
    return stored if stored in get_args(DtypeName) else "auto"


def start_engine(settings: Settings, arguments: Any) -> Any:
    """Start vLLM's `AsyncLLM`, with its engine in a process of its own.

    Raises:
        ConfigurationError: vLLM does not take the model or the flags.
    """
    from vllm.v1.engine.async_llm import AsyncLLM

    try:
        config = arguments.create_engine_config()
    except Exception as error:  # whatever a checkpoint's files or a flag can cause
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigurationError(f"vLLM does not take {settings.model}: {reason}") from error
    return AsyncLLM.from_vllm_config(config, disable_log_stats=arguments.disable_log_stats)


def lora_request(number: int, module: LoraModule) -> Any:
    """Return an adapter as vLLM's engine takes it; ``number`` is from 1."""
    from vllm.lora.request import LoRARequest

    return LoRARequest(module.name, number, str(Path(module.path).resolve()))


def engine_facts(
    settings: Settings,
    config: Any,
    arguments: Any,
    tokenizer: Any,
    vocab_size: int,
    in_worker: bool,
) -> BackendFacts:
    """Return what `/v1/info` reports of a running engine.

    Args:
        config: the engine's `ModelConfig`.
        in_worker: scores come from inside its workers.
    """
    import vllm

    try:
        generation = GenerationConfig.from_pretrained(settings.model)
    except OSError:  # a checkpoint without generation_config.json
        generation = GenerationConfig.from_model_config(config.hf_config)
    # Quantization changes the numbers, so it is part of the identity.
    dtype = str(config.dtype).removeprefix("torch.")
    if config.quantization is not None:
        dtype += f"+{config.quantization}"
    if arguments.kv_cache_dtype != "auto":
        dtype += f"+{arguments.kv_cache_dtype}-kv"
    teacher = TeacherIdentity(
        model=settings.name,
        fingerprint=model_fingerprint(local_folder(settings.model)),
        dtype=dtype,
        backend="vllm",
        version=vllm.__version__,
    )
    return BackendFacts(
        teacher=teacher,
        adapters=adapter_identities(teacher, settings.adapters),
        tokenizer=tokenizer_identity(tokenizer),
        vocab_size=vocab_size,
        max_model_len=int(config.max_model_len),
        eos_token_ids=eos_token_ids(generation, tokenizer),
        capabilities=Capabilities(
            temperature=in_worker,
            requested_token_ids=in_worker,
            generate=True,
            sample_seed=in_worker,
        ),
    )

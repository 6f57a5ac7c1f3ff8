"""The flags of the student's own completions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from student_trainer.config.flags import flag


@dataclass
class RolloutFlags:
    """The writer of the student's completions, its sampling, and the age of its weights."""

    rollout_temperature: float = flag(
        1.0,
        "Sampling temperature of the student's rollouts.",
        group="rollouts and generation",
        resume="same",
    )
    rollout_top_p: float = flag(
        1.0,
        "Sample rollouts from the most probable tokens that together have this probability; 1 is "
        "off. As --rollout_top_k and --rollout_min_p, it leaves strict on-policy.",
        group="rollouts and generation",
        resume="same",
    )
    rollout_top_k: int = flag(
        0,
        "Sample rollouts from so many of the most probable tokens; 0 is off.",
        group="rollouts and generation",
        resume="same",
    )
    rollout_min_p: float = flag(
        0.0,
        "Sample rollouts from tokens of at least this share of the most probable one's "
        "probability; 0 is off.",
        group="rollouts and generation",
        resume="same",
    )
    num_generations: int = flag(
        1,
        "Completions of each prompt in a step; needs --lmbda 1. The batch counts completions: "
        "with 4, a step of 32 has 8 prompts.",
        group="rollouts and generation",
        resume="same",
    )
    rollout_staleness: int = flag(
        0,
        "Steps by which the student's completions may be older than the weights that learn from "
        "them. 0 is strictly on-policy; at 1 the teacher scores the next step's completions while "
        "this step trains. The same holds for ids that the student proposes.",
        group="rollouts and generation",
        common=True,
        resume="told",
    )
    rollout_engine: Literal["transformers", "vllm"] = flag(
        "transformers",
        "Who writes the student's completions. transformers: the student itself. vllm: an engine "
        "beside it that is given the weights before each on-policy step.",
        group="rollouts and generation",
        resume="told",
    )
    vllm_gpu_memory_utilization: float = flag(
        0.3,
        "Share of the GPU's memory for --rollout_engine vllm, its weights included.",
        group="rollouts and generation",
        needs=("rollout_engine", "vllm"),
    )
    vllm_tensor_parallel_size: int = flag(
        1,
        "Processes of a machine that share one engine of --rollout_engine vllm, which splits the "
        "weights over their GPUs. 1: an engine for each.",
        group="rollouts and generation",
        resume="told",
        needs=("rollout_engine", "vllm"),
    )
    vllm_enable_sleep_mode: bool = flag(
        False,
        "Free the memory of --rollout_engine vllm, weights included, while the student trains. "
        "GPUs only.",
        group="rollouts and generation",
        needs=("rollout_engine", "vllm"),
    )
    rollout_url: list[str] | None = flag(
        None,
        "Address of a vLLM server that writes the student's completions on other GPUs, such as "
        "http://host:8001; repeat for replicas. It gets the student's weights before each "
        "on-policy step.",
        group="rollouts and generation",
        private=True,
        extends=True,
    )
    rollout_transfer: Literal["nccl", "gloo"] | None = flag(
        None,
        "What carries the weights to --rollout_url: nccl between GPUs, gloo between CPUs. Default: "
        "what the student is on.",
        group="rollouts and generation",
        needs=("rollout_url", True),
    )
    rollout_timeout: float = flag(
        600.0,
        "Seconds to wait for a server of --rollout_url, and for its next token.",
        group="rollouts and generation",
        needs=("rollout_url", True),
    )
    rollout_max_tokens_in_flight: int | None = flag(
        None,
        "Tokens that all processes together have open at the servers of --rollout_url at once: "
        "prompts, and completions at their longest. Default: no bound.",
        group="rollouts and generation",
        needs=("rollout_url", True),
    )
    rollout_api_key_file: str | None = flag(
        None,
        "File that holds the API key of --rollout_url; default: the environment variable "
        "ROLLOUT_API_KEY.",
        group="rollouts and generation",
        private=True,
        needs=("rollout_url", True),
    )

"""The flags of `evaluate` and `merge`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from student_trainer.config.flags import flag


@dataclass
class EvaluateArguments:
    """Score a model on rows that carry a checker."""

    suite: str = flag(
        "auto",
        "humaneval or gsm8k, from the Hub; or a JSONL file or folder of HumanEval's or GSM8K's "
        "rows as published, or of rows with a checker. With --dataset_name: what that holds, "
        "humaneval, gsm8k, rows, or auto, which tells from the fields.",
        group="data",
        common=True,
    )
    raw_prompt: bool = flag(
        False,
        "Let the model continue HumanEval's prompts as in the paper, up to what begins after the "
        "function; default where the tokenizer has no chat template. With one, the model is asked "
        "for a code block.",
        group="data",
    )
    temperature: float = flag(
        0.0, "Sampling temperature; 0 is greedy.", group="generation", common=True
    )
    n: int = flag(1, "Completions for each problem.", group="generation", common=True)
    seed: int = flag(42, "Seed of the sampling.", group="generation")
    limit: int | None = flag(None, "Only the first problems.", group="data", common=True)
    check_timeout: float = flag(
        5.0, "Seconds a completion's own tests may take.", group="checks and results"
    )
    unsafe_sandbox: bool = flag(
        False,
        "Run model-written programs also where the kernel refuses a fence (seccomp, Landlock): "
        "they have your rights then. Default: an error that names it.",
        group="checks and results",
    )
    rollout_engine: Literal["transformers", "vllm"] = flag(
        "transformers",
        "Who writes the completions; vllm is an engine beside the model.",
        group="generation",
    )
    vllm_gpu_memory_utilization: float = flag(
        0.3,
        "Share of the GPU's memory for --rollout_engine vllm, its weights included.",
        group="generation",
        needs=("rollout_engine", "vllm"),
    )
    beta: float = flag(
        0.0,
        "Of the divergence to --teacher_url on the references: 0 forward KL, 1 reverse KL, between "
        "them generalized JSD.",
        group="teacher",
        common=True,
    )
    output_dir: str = flag(
        "", "Folder for results.json and samples.jsonl.", group="checks and results", common=True
    )
    overwrite_output_dir: bool = flag(
        False,
        "Replace the results of an earlier evaluation in --output_dir, which is refused without.",
        group="checks and results",
    )


@dataclass
class MergeArguments:
    """Merge LoRA adapters into their base model, for serving or as a student."""

    model_name_or_path: str = flag(
        "", "Folder of a run with --use_peft.", group="model", common=True
    )
    output_dir: str = flag(
        "", "New folder for the merged model and its tokenizer.", group="model", common=True
    )
    torch_dtype: Literal["auto", "float32", "bfloat16", "float16"] = flag(
        "auto",
        "Dtype of the merged weights; auto takes the base model's.",
        aliases=("--dtype",),
        group="model",
        common=True,
    )
    trust_remote_code: bool = flag(
        False, "Run model code that comes with the checkpoint.", group="model", common=True
    )

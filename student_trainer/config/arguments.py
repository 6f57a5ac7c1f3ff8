"""Every flag of the trainer, and how flags are read.

`sft` and `distill` take the flags of transformers' `TrainingArguments` beside those below. A YAML
file given by ``--config`` holds the same names; the command line overrides it. What flags may not
say, alone or together, stands in `student_trainer.config.checks`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from transformers import PreTrainedTokenizerBase, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from shared.errors import ConfigurationError
from student_trainer.runtime.terminal import can_move

T = TypeVar("T")


def _flag(default: Any, help: str, **metadata: Any) -> Any:
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help, **metadata})
    return field(default=default, metadata={"help": help, **metadata})


@dataclass(frozen=True)
class LoadedModel:
    """A causal language model and its tokenizer, in memory already."""

    model: Any
    tokenizer: PreTrainedTokenizerBase


@dataclass
class ModelArguments:
    """The model, and its tokenizer.

    ``loaded`` is no flag: what a caller in Python has at hand, in the place of a name.
    """

    model_name_or_path: str = _flag(
        "", "Folder (LoRA adapters are merged into their base) or Hugging Face Hub id."
    )
    model_revision: str = _flag("main", "Branch, tag or commit on the Hub.")
    torch_dtype: Literal["auto", "float32", "bfloat16", "float16"] = _flag(
        "float32", "Dtype of the weights; auto takes the checkpoint's.", aliases=["--dtype"]
    )
    trust_remote_code: bool = _flag(False, "Run model code that comes with the checkpoint.")
    eos_token: str | None = _flag(
        None, "Token that ends a completion, where the chat template ends turns with another one."
    )
    chat_template: str | None = _flag(
        None, "File with a chat template (Jinja), in the place of the tokenizer's own."
    )
    attn_implementation: str | None = _flag(None, "eager, sdpa, flash_attention_2, …")
    loaded: LoadedModel | None = field(default=None, init=False)


@dataclass
class AdapterArguments:
    """LoRA and QLoRA instead of full weights."""

    use_peft: bool = _flag(False, "Train LoRA adapters instead of all weights.")
    lora_r: int = _flag(16, "Rank of the adapters.")
    lora_alpha: int = _flag(32, "Scale of the adapters: alpha / r.")
    lora_dropout: float = _flag(0.0, "Dropout before the adapters.")
    lora_target_modules: list[str] | None = _flag(
        None, "Modules to adapt; default all linear layers but the output layer."
    )
    load_in_4bit: bool = _flag(False, "QLoRA: NF4 base weights (needs a GPU and bitsandbytes).")


@dataclass
class DatasetArguments:
    """Where the rows come from.

    ``rows`` are no flag: what a caller in Python has at hand, in the place of a name.
    """

    dataset_name: list[str] = _flag(
        [],
        "File of rows (Parquet, Arrow, JSONL, JSON, CSV, TSV; text also compressed), a folder of "
        "such files or of save_to_disk, a glob, or a Hub id; several are put together.",
    )
    dataset_config: str | None = _flag(None, "Configuration name of a Hub dataset.")
    dataset_split: str = _flag(
        "train", "Split of a Hub dataset, a saved DatasetDict, or a folder whose files name splits."
    )
    rows: Iterable[Mapping[str, Any]] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if isinstance(self.dataset_name, str):  # one name, as Python callers give it
            self.dataset_name = [self.dataset_name]
        if self.dataset_name == [""]:
            self.dataset_name = []


@dataclass
class DataArguments:
    """What is learned from a row, and which rows are held out; ``eval_rows`` are no flag."""

    eval_dataset_name: str | None = _flag(None, "Held-out rows, for --eval_strategy.")
    eval_dataset_split: str = _flag("test", "As --dataset_split, of the held-out rows.")
    dataset_weights: list[float] | None = _flag(
        None,
        "Relative share of each --dataset_name in an epoch, such as 2 1: rows are repeated until "
        "the shares are right, and none is left out. Default: each row once.",
    )
    streaming: bool = _flag(
        False,
        "Read and tokenize rows while the run goes on, for what does not fit in memory; needs "
        "--max_steps.",
    )
    shuffle_buffer_size: int | None = _flag(
        None, "Rows that --streaming holds to draw the next one from. Default: 10000."
    )
    dataset_num_proc: int | None = _flag(
        None,
        "Processes that tokenize, from 2,000 rows on. Default: as many as CPUs, up to 8.",
    )
    prompt_column: str = _flag(
        "prompt",
        "Column of the prompt; a text column of another name (question in GSM8K) is a user turn.",
    )
    completion_column: str = _flag(
        "completion", "Column of the completion (answer in GSM8K: then an assistant turn)."
    )
    max_length: int | None = _flag(
        None, "Longest prompt + completion, in tokens; completions are cut at it. Default: context."
    )
    skip_long_rows: bool = _flag(
        False, "Leave out rows without room for a completion, and say how many, instead of failing."
    )
    assistant_turns: Literal["last", "all"] = _flag(
        "last",
        "Which turns of the assistant are learned. all: each after its own history; on-policy each "
        "history is a prompt.",
    )
    assistant_only_loss: bool = _flag(False, "Old name of --assistant_turns all.")
    split_special_tokens: bool | None = _flag(
        None,
        "How plain text that spells a special token, such as <s>, is read. true: as text. false: "
        "as the token. Default: an error. In messages it is always text.",
    )
    eval_rows: Iterable[Mapping[str, Any]] | None = field(default=None, init=False)

    @property
    def learns_all_turns(self) -> bool:
        return self.assistant_turns == "all" or self.assistant_only_loss


# Of these a row's examples depend on.
ROW_OPTIONS = (
    "prompt_column", "completion_column", "assistant_turns", "assistant_only_loss",
    "split_special_tokens",
)  # fmt: skip


@dataclass
class TemplateArguments:
    """What the chat template is told, for prompts and completions alike."""

    chat_template_kwargs: str | None = _flag(
        None,
        "JSON object for the chat template, such as '{\"enable_thinking\": false}'. A row's own "
        "column of this name comes first.",
    )
    chat_template_date: str | None = _flag(
        None,
        "Date (YYYY-MM-DD) that templates print which print today's. Default: that of the run's "
        "first start, or of --teacher_cache.",
    )

    def __post_init__(self) -> None:
        _ = self.kwargs

    @property
    def kwargs(self) -> dict[str, Any]:
        """``--chat_template_kwargs`` as an object.

        Raises:
            ConfigurationError: it is none.
        """
        if self.chat_template_kwargs is None:
            return {}
        try:
            values = json.loads(self.chat_template_kwargs)
        except ValueError as error:
            raise ConfigurationError(
                f"--chat_template_kwargs {self.chat_template_kwargs!r} is not valid JSON: {error}"
            ) from error
        if not isinstance(values, dict):
            raise ConfigurationError(
                f"--chat_template_kwargs {self.chat_template_kwargs!r} must be a JSON object such "
                'as {"enable_thinking": false}'
            )
        return values


@dataclass
class GenerationArguments:
    """How completions are sampled."""

    max_new_tokens: int = _flag(128, "Longest completion that is generated, in tokens.")
    generation_batch_size: int | None = _flag(
        None, "Prompts generated at once; default as many as a step has (`evaluate`: 32)."
    )


@dataclass
class TeacherArguments:
    """The served teacher."""

    teacher_url: list[str] | None = _flag(
        None,
        "Address of a teacher server, such as http://host:8000; repeat for replicas: one that "
        "fails is left out until it is ready again.",
        action="extend",
    )
    teacher_protocol: Literal["sparse-gkd", "vllm"] = _flag(
        "sparse-gkd",
        "vllm: the addresses are of a stock `vllm serve`; slower, at --temperature 1 only, and "
        "weights and vocabulary are not proved to be the right ones.",
    )
    teacher_api_key_file: str | None = _flag(
        None,
        "File that holds the teacher's API key; default: the environment variable TEACHER_API_KEY.",
    )
    teacher_timeout: float = _flag(
        600.0,
        "Seconds to wait for a teacher, at the start and in a retried request; one attempt takes "
        "at most an equal share of it for each replica, and is then asked in halves if the teacher "
        "is ready.",
    )
    teacher_unreachable: Literal["wait", "stop"] = _flag(
        "wait",
        "Once a request failed and no teacher is ready any more: wait for one, up to "
        "--teacher_timeout, or stop at once. Either way a run that ends saves a checkpoint first.",
    )
    top_k_logprobs: int = _flag(64, "Teacher log-probs for each position (top-k).")
    teacher_logprob_dtype: Literal["float16", "float32"] = _flag(
        "float16",
        "Of the top-k on the wire; the next token and the tail are float32 always, and the rounded "
        "top-k is made to sum to one with them. float32 takes a third more bytes.",
    )
    teacher_repeat_tolerance: float = _flag(
        0.05,
        "Probability by which the teacher's answers to two rows may differ when it is asked twice, "
        "before training; at more it is refused.",
    )
    accept_teacher_change: bool = _flag(
        False, "Go on when another teacher answers at the same address in the middle of a run."
    )
    teacher_cache: str | None = _flag(
        None,
        "Folder, on a local disk, that keeps the teacher's answers for later epochs, other ranks "
        "and other runs; the same question is asked once. Supervised KD and SeqKD then run without "
        "a teacher. What depends on the student's weights is not kept.",
    )
    teacher_cache_max_gb: float = _flag(
        10.0, "Size of --teacher_cache; what was used longest ago makes room for new answers."
    )


@dataclass
class CommonTrainingArguments(TrainingArguments):
    """transformers' TrainingArguments, with defaults that this trainer needs."""

    output_dir: str | None = _flag(None, "Folder for checkpoints, the final model and logs.")
    logging_first_step: bool = _flag(True, "Log the first step.")
    remove_unused_columns: bool = _flag(False, "Not used: rows become token ids here.")
    disable_tqdm: bool | None = _flag(
        None, "A line for each log instead of a bar. Default: where there is no terminal."
    )
    greater_is_better: bool | None = _flag(
        None,
        "Whether more of --metric_for_best_model is better. Default: not of loss and divergence.",
    )
    loss_kernel: Literal["auto", "torch", "triton"] = _flag(
        "auto",
        "Who computes the divergence: auto takes Triton on a GPU and PyTorch elsewhere; torch and "
        "triton force one.",
    )
    max_tokens_per_batch: int | None = _flag(
        None,
        "Regroup the samples of each optimizer step by length into the fewest micro-batches of at "
        "most so many tokens, padding included; a longer sample is alone. Default: as many as "
        "--per_device_train_batch_size in each.",
    )
    packing: Literal["auto", "on", "off"] = _flag(
        "auto",
        "Sequences of a micro-batch end to end in one row, without padding, where the model is "
        "seen to give them the same logits. auto: with flash attention, otherwise padded; on: with "
        "any (other kernels pay with a mask over the whole row), or an error; off: padded.",
    )
    nonfinite: Literal["stop", "skip"] = _flag(
        "stop",
        "What becomes of a step whose loss or gradient is NaN or infinite. stop: the run ends "
        "before the optimizer's step, with the batch in --output_dir. skip: the weights stay as "
        "they are, and the log counts skipped_steps.",
    )
    unsafe_sandbox: bool = _flag(
        False,
        "Run model-written programs also where the kernel refuses a fence (seccomp, Landlock): "
        "they have your rights then. Default: an error that names it.",
    )
    trace_steps: str | None = _flag(
        None,
        "N or N-M: write trace.json in --output_dir, what went on when in these steps, for "
        "https://ui.perfetto.dev.",
    )
    ddp_find_unused_parameters: bool | None = _flag(
        False, "Only for models that leave parameters out of a step (mixtures of experts)."
    )
    dry_run: bool = _flag(
        False,
        "Check flags, data and teacher, show four rows as they are learned, what the teacher says "
        "of them, and an estimate of memory and traffic; load no weights, write nothing, and stop.",
    )

    def __post_init__(self) -> None:
        if not self.output_dir:
            raise ConfigurationError("--output_dir is missing: give a folder for the trained model")
        if uses_deepspeed(self) and importlib.util.find_spec("deepspeed") is None:
            raise ConfigurationError("DeepSpeed is not installed here: pip install deepspeed")
        # bfloat16 autocast works on a CPU; transformers asks to be told that one is meant.
        if not torch.accelerator.is_available():
            self.use_cpu = True
            if uses_deepspeed(self) and "LOCAL_RANK" in os.environ:
                import deepspeed

                # accelerate does so for accelerators alone, and ZeRO-3 then counts one process.
                deepspeed.init_distributed("gloo")
        if self.disable_tqdm is None and not can_move():
            self.disable_tqdm = True
        best = self.metric_for_best_model
        if self.greater_is_better is None and best is not None:
            # transformers takes the greatest of whatever is not called a loss.
            self.greater_is_better = not best.endswith(("loss", "divergence"))
        super().__post_init__()


@dataclass
class SFTArguments(CommonTrainingArguments):
    """Supervised fine-tuning: forward KL to the data's one-hot distribution. Needs no teacher."""


@dataclass
class DistillArguments(CommonTrainingArguments):
    """Which completions, and which divergence (GKD, arXiv 2306.13649)."""

    lmbda: float = _flag(
        0.5, "Probability that a step is on-policy: 0 dataset or teacher completions, 1 student's."
    )
    beta: float = _flag(
        0.5,
        "Generalized JSD: 0 is forward KL(teacher‖student), 1 reverse KL(student‖teacher), between "
        "them a mixture. Discontinuous at both ends: near 0 and 1 the interior form tends to 0, so "
        "0.9 is about 12 times weaker than 1.",
    )
    temperature: float = _flag(1.0, "Divides both logits in the divergence; no T² factor.")
    teacher_support: Literal["top_k", "sampled"] = _flag(
        "top_k",
        "Which tokens the teacher's log-probs are of. top_k: its --top_k_logprobs most probable "
        "ones. sampled: so many draws from its whole distribution, new in each step: a gradient "
        "that is right in the mean at any number of them, but noisy; only for --beta 0.",
    )
    tail: Literal["bucket", "renormalize"] = _flag(
        "bucket",
        "What becomes of the probability off the support. bucket: one more outcome, so the value "
        "is never above the dense divergence. renormalize: dropped, and both sides rescaled over "
        "the support, as some systems do; biased, there to compare with them.",
    )
    sft_weight: float = _flag(
        0.0,
        "Share w of the hard labels: (1 − w)·divergence + w·cross-entropy on completions of the "
        "dataset or the teacher (not on the student's own). Holds the student to known good "
        "completions where the teacher is unsure or wrong.",
    )
    request_student_top_m: int | None = _flag(
        None,
        "Ask the teacher for the student's own M most probable tokens in each row too, and join "
        "them to the support. What the student likes and the teacher does not is where reverse KL "
        "and JSD are decided. Costs one forward pass without gradient, with weights as old as "
        "--rollout_staleness says; with --seq_kd the teacher scores its completions in a second "
        "call. Default: 16 for --beta 1, which is far from the dense gradient without, otherwise "
        "none.",
    )
    seq_kd: bool = _flag(
        False, "Off-policy completions come from the teacher (SeqKD), not from the dataset."
    )
    seq_kd_temperature: float = _flag(0.0, "Sampling temperature of the teacher; 0 is greedy.")
    rollout_temperature: float = _flag(1.0, "Sampling temperature of the student's rollouts.")
    rollout_staleness: int = _flag(
        0,
        "Steps by which rollouts, and ids that the student proposes, run ahead of the weights that "
        "learn from them. 0 is strictly on-policy; at 1 the teacher scores the next step's "
        "completions while this step trains.",
    )
    teacher_prefetch_steps: int = _flag(
        2,
        "Steps by which completions that do not depend on the student's weights are scored ahead, "
        "at least --rollout_staleness; their scores are held in memory meanwhile.",
    )
    rollout_engine: Literal["transformers", "vllm"] = _flag(
        "transformers",
        "Who writes the student's completions. transformers: the student itself. vllm: an engine "
        "beside it that is given the weights before each on-policy step.",
    )
    vllm_gpu_memory_utilization: float = _flag(
        0.3, "Share of the GPU's memory for --rollout_engine vllm, its weights included."
    )

    @property
    def student_top_m(self) -> int:
        """``request_student_top_m``, or its default for this beta."""
        if self.request_student_top_m is None:
            return 16 if self.beta == 1.0 else 0
        return self.request_student_top_m


@dataclass
class EvaluateArguments:
    """Score a model on rows that carry a checker."""

    suite: str = _flag(
        "auto",
        "humaneval or gsm8k, from the Hub; or a JSONL file or folder of HumanEval's or GSM8K's "
        "rows as published, or of rows with a checker. With --dataset_name: what that holds, "
        "humaneval, gsm8k, rows, or auto, which tells from the fields.",
    )
    raw_prompt: bool = _flag(
        False,
        "Let the model continue HumanEval's prompts as in the paper, up to what begins after the "
        "function; default where the tokenizer has no chat template. With one, the model is asked "
        "for a code block.",
    )
    temperature: float = _flag(0.0, "Sampling temperature; 0 is greedy.")
    n: int = _flag(1, "Completions for each problem.")
    seed: int = _flag(42, "Seed of the sampling.")
    limit: int | None = _flag(None, "Only the first problems.")
    check_timeout: float = _flag(5.0, "Seconds a completion's own tests may take.")
    unsafe_sandbox: bool = _flag(
        False,
        "Run model-written programs also where the kernel refuses a fence (seccomp, Landlock): "
        "they have your rights then. Default: an error that names it.",
    )
    rollout_engine: Literal["transformers", "vllm"] = _flag(
        "transformers", "Who writes the completions; vllm is an engine beside the model."
    )
    vllm_gpu_memory_utilization: float = _flag(
        0.3, "Share of the GPU's memory for --rollout_engine vllm, its weights included."
    )
    beta: float = _flag(
        0.0,
        "Of the divergence to --teacher_url on the references: 0 forward KL, 1 reverse KL, between "
        "them generalized JSD.",
    )
    output_dir: str = _flag("", "Folder for results.json and samples.jsonl.")


@dataclass
class MergeArguments:
    """LoRA adapters into their base model, for serving or as a student."""

    model_name_or_path: str = _flag("", "Folder of a run with --use_peft.")
    output_dir: str = _flag("", "New folder for the merged model and its tokenizer.")
    torch_dtype: Literal["auto", "float32", "bfloat16", "float16"] = _flag(
        "auto", "Dtype of the merged weights; auto takes the base model's.", aliases=["--dtype"]
    )
    trust_remote_code: bool = _flag(False, "Run model code that comes with the checkpoint.")


def traced_steps(args: CommonTrainingArguments) -> tuple[int, int] | None:
    """First and last step of ``--trace_steps``, counted from 1.

    Raises:
        ConfigurationError: that is no range of steps.
    """
    if args.trace_steps is None:
        return None
    given = re.fullmatch(r"(\d+)(?:-(\d+))?", args.trace_steps)
    first, last = (int(given[1]), int(given[2] or given[1])) if given else (0, 0)
    if not 1 <= first <= last:
        raise ConfigurationError(
            f"--trace_steps {args.trace_steps} must be a step from 1, or a range such as 10-12"
        )
    return first, last


def checkpoint_of(args: CommonTrainingArguments) -> str | None:
    """The checkpoint folder to resume from.

    ``true`` is the last one in ``--output_dir``; ``auto`` as well, or none where there is none yet:
    for services that start again by the same command.

    Raises:
        ConfigurationError: there is no such checkpoint.
    """
    given = args.resume_from_checkpoint
    if given is None or given.lower() == "false":
        return None
    if given.lower() in ("true", "auto"):
        folder = Path(args.output_dir or "")
        last: str | None = get_last_checkpoint(folder) if folder.is_dir() else None
        if last is None and given.lower() == "true":
            raise ConfigurationError(
                f"--resume_from_checkpoint {given}: {folder} holds no checkpoint to resume from"
            )
        return last
    if not (Path(given) / "trainer_state.json").exists():
        raise ConfigurationError(
            f"--resume_from_checkpoint {given}: no checkpoint there; give a checkpoint-N folder, "
            "or true for the last one in --output_dir"
        )
    return given


def uses_deepspeed(args: TrainingArguments) -> bool:
    """Whether it was asked for by ``--deepspeed`` or by accelerate's launcher."""
    return bool(args.deepspeed) or os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"


def uses_fsdp(args: TrainingArguments) -> bool:
    """Whether it was asked for by ``--fsdp`` or by accelerate's launcher."""
    return bool(args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP") == "true"

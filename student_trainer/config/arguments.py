"""The flags of the trainer: each is a field of one of these dataclasses of plain values.

`sft` and `distill` also take the flags of transformers' `TrainingArguments`, which
`config.training_arguments` builds once all flags are checked. `config.checks` has the checks.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from shared.errors import ConfigurationError
from student_trainer.config.flags import flag
from student_trainer.config.trainer_flags import TrainerFlags

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, TrainingArguments


@dataclass(frozen=True)
class LoadedModel:
    """A causal language model and its tokenizer, in memory already."""

    model: Any
    tokenizer: PreTrainedTokenizerBase


@dataclass
class ModelArguments:
    """The model, and its tokenizer.

    ``loaded`` is not a flag: a Python caller may set a loaded model in place of a name.
    """

    model_name_or_path: str = flag(
        "",
        "Folder (LoRA adapters are merged into their base) or Hugging Face Hub id.",
        group="model",
        common=True,
        resume="told",
        private=True,
    )
    model_revision: str = flag(
        "main", "Branch, tag or commit on the Hub.", group="model", resume="told"
    )
    torch_dtype: Literal["auto", "checkpoint", "float32", "bfloat16", "float16"] = flag(
        "auto",
        "Dtype of the weights. auto: bfloat16 on a GPU that has it; float32 elsewhere, and with "
        "--bf16 or --fp16, which compute in that and keep float32 weights; a resumed run keeps its "
        "own. checkpoint: as stored (transformers' auto).",
        aliases=("--dtype",),
        group="model",
        common=True,
        resume="told",
    )
    trust_remote_code: bool = flag(
        False, "Run model code that comes with the checkpoint.", group="model"
    )
    eos_token: str | None = flag(
        None,
        "Token that ends a completion, where the chat template ends turns with another one.",
        group="model",
        resume="same",
    )
    chat_template: str | None = flag(
        None,
        "File with a chat template (Jinja), in the place of the tokenizer's own.",
        group="chat template",
        resume="told",
    )
    attn_implementation: str | None = flag(
        None, "eager, sdpa, flash_attention_2, …", group="model", resume="told"
    )
    loaded: LoadedModel | None = field(default=None, init=False)


@dataclass
class AdapterArguments:
    """The training of LoRA or QLoRA adapters instead of all weights."""

    use_peft: bool = flag(
        False,
        "Train LoRA adapters instead of all weights.",
        group="LoRA",
        common=True,
        resume="same",
    )
    lora_r: int = flag(
        16, "Rank of the adapters.", group="LoRA", resume="same", needs=("use_peft", True)
    )
    lora_alpha: int | None = flag(
        None,
        "Scale of the adapters: alpha / r. Default: twice --lora_r, so that another rank keeps the "
        "scale, and with it the learning rate.",
        group="LoRA",
        resume="same",
        needs=("use_peft", True),
    )
    lora_dropout: float = flag(
        0.0, "Dropout before the adapters.", group="LoRA", resume="told", needs=("use_peft", True)
    )
    lora_target_modules: list[str] | None = flag(
        None,
        "Modules to adapt; default all linear layers but the output layer.",
        group="LoRA",
        resume="same",
        needs=("use_peft", True),
    )
    load_in_4bit: bool = flag(
        False,
        "QLoRA: NF4 base weights (needs a GPU and bitsandbytes).",
        group="LoRA",
        resume="same",
    )

    @property
    def alpha(self) -> int:
        """The value of ``lora_alpha``, or its default for this rank."""
        return 2 * self.lora_r if self.lora_alpha is None else self.lora_alpha


@dataclass
class DatasetArguments:
    """The source of the rows.

    ``rows`` is not a flag: a Python caller may set rows in place of a name.
    """

    dataset_name: list[str] = flag(
        [],
        "Rows: a file, a folder, a glob or a Hub id. A file is Parquet, Arrow, JSONL, JSON, CSV or "
        "TSV, text also compressed; a folder holds such files, or what save_to_disk wrote. "
        "Several names are put together.",
        group="data",
        common=True,
        resume="told",
        private=True,
    )
    dataset_config: str | None = flag(
        None, "Configuration name of a Hub dataset.", group="data", resume="told"
    )
    dataset_split: str = flag(
        "train",
        "Split of a Hub dataset, a saved DatasetDict, or a folder whose files name splits.",
        group="data",
        resume="told",
    )
    rows: Iterable[Mapping[str, Any]] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if isinstance(self.dataset_name, str):  # one name, as Python callers give it
            self.dataset_name = [self.dataset_name]
        if self.dataset_name == [""]:
            self.dataset_name = []


@dataclass
class DataArguments:
    """The part of each row that is learned, and the held-out rows.

    ``eval_rows`` is not a flag: a Python caller may set rows in place of a name.
    """

    eval_dataset_name: str | None = flag(
        None,
        "Held-out rows, for --eval_strategy.",
        group="evaluation and logs",
        common=True,
        private=True,
    )
    eval_dataset_split: str = flag(
        "test", "As --dataset_split, of the held-out rows.", group="evaluation and logs"
    )
    dataset_weights: list[float] | None = flag(
        None,
        "Relative share of each --dataset_name in an epoch, such as 2 1: rows are repeated until "
        "the shares are right, and none is left out. Default: each row once.",
        group="data",
        resume="same",
    )
    streaming: bool = flag(
        False,
        "Read and tokenize rows while the run goes on, for what does not fit in memory; needs "
        "--max_steps.",
        group="data",
        resume="same",
    )
    shuffle_buffer_size: int | None = flag(
        None,
        "Rows that --streaming holds to draw the next one from. Default: 10000.",
        group="data",
        resume="same",
    )
    dataset_num_proc: int | None = flag(
        None,
        "Processes that tokenize, from 2,000 rows on. Default: as many as CPUs, up to 8.",
        group="data",
    )
    prompt_column: str = flag(
        "prompt",
        "Column of the prompt; a text column of another name (question in GSM8K) is a user turn.",
        group="data",
        resume="told",
    )
    completion_column: str = flag(
        "completion",
        "Column of the completion (answer in GSM8K: then an assistant turn).",
        group="data",
        resume="told",
    )
    max_length: int | None = flag(
        None,
        "Longest prompt + completion, in tokens; completions are cut at it. Default: context.",
        group="data",
        common=True,
        resume="told",
    )
    skip_long_rows: bool = flag(
        False,
        "Leave out rows without room for a completion, and say how many, instead of failing.",
        group="data",
        resume="told",
    )
    assistant_turns: Literal["last", "all"] = flag(
        "last",
        "Which turns of the assistant are learned. all: each after its own history; on-policy each "
        "history is a prompt.",
        group="data",
        resume="same",
    )
    assistant_only_loss: bool = flag(
        False, "Old name of --assistant_turns all.", group="data", resume="told"
    )
    split_special_tokens: bool | None = flag(
        None,
        "How plain text that spells a special token, such as <s>, is read. true: as text. false: "
        "as the token. Default: an error. In messages it is always text.",
        group="data",
        resume="told",
    )
    eval_rows: Iterable[Mapping[str, Any]] | None = field(default=None, init=False)

    @property
    def learns_all_turns(self) -> bool:
        return self.assistant_turns == "all" or self.assistant_only_loss


# Options that decide which examples a row becomes.
ROW_OPTIONS = (
    "prompt_column", "completion_column", "assistant_turns", "assistant_only_loss",
    "split_special_tokens",
)  # fmt: skip


@dataclass
class TemplateArguments:
    """The options of the chat template, for prompts and completions alike."""

    chat_template_kwargs: str | None = flag(
        None,
        "JSON object for the chat template, such as '{\"enable_thinking\": false}'. A row's own "
        "column of this name comes first.",
        group="chat template",
        resume="same",
    )
    chat_template_date: str | None = flag(
        None,
        "Date (YYYY-MM-DD) that templates print which print today's. Default: that of the run's "
        "first start, or of --teacher_cache.",
        group="chat template",
    )

    def __post_init__(self) -> None:
        _ = self.kwargs

    @property
    def kwargs(self) -> dict[str, Any]:
        """The value of ``--chat_template_kwargs``, parsed.

        Raises:
            ConfigurationError: it is not a JSON object.
        """
        return _json_object("--chat_template_kwargs", self.chat_template_kwargs)


def _json_object(name: str, text: str | None) -> dict[str, Any]:
    """Return the value of a flag that is a JSON object; empty for None.

    Raises:
        ConfigurationError: it is not a JSON object.
    """
    if text is None:
        return {}
    try:
        values = json.loads(text)
    except ValueError as error:
        raise ConfigurationError(f"{name} {text!r} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ConfigurationError(
            f'{name} {text!r} must be a JSON object such as {{"enable_thinking": false}}'
        )
    return values


@dataclass
class GenerationArguments:
    """The limits of generated completions."""

    max_new_tokens: int = flag(
        128,
        "Longest completion that is generated, in tokens.",
        group="rollouts and generation",
        common=True,
        resume="same",
    )
    generation_batch_size: int | None = flag(
        None,
        "Prompts generated at once; default as many as a step has (`evaluate`: 32).",
        group="rollouts and generation",
    )


@dataclass
class TeacherArguments:
    """The served teacher."""

    teacher_url: list[str] | None = flag(
        None,
        "Address of a teacher server, such as http://host:8000; repeat for replicas: one that "
        "fails is left out until it is ready again. Several teachers: math=http://a code=http://b, "
        "each for the rows that name it; http://a#MODEL where a server has several models.",
        extends=True,
        group="teacher",
        common=True,
        private=True,
    )
    teacher_column: str = flag(
        "teacher",
        "Column that names a row's teacher, where --teacher_url gives names; rows without a name "
        "have the first teacher.",
        group="teacher",
        resume="same",
    )
    dataset_teacher: list[str] | None = flag(
        None,
        "The teacher of the rows of each --dataset_name, in order; a row's own --teacher_column "
        "comes first.",
        group="teacher",
        resume="same",
    )
    teacher_prompt_template: str | None = flag(
        None,
        "File of a Jinja template over a row's columns that makes the prompt which only the "
        "teacher sees, such as {{ question }} and a reference answer; in place of a column "
        "teacher_prompt (text) or teacher_messages.",
        group="teacher",
        resume="told",
    )
    teacher_chat_template_kwargs: str | None = flag(
        None,
        "As --chat_template_kwargs, for the prompt that only the teacher sees.",
        group="teacher",
        resume="same",
    )
    teacher_protocol: Literal["sparse-gkd", "vllm"] = flag(
        "sparse-gkd",
        "vllm: the addresses are of a stock `vllm serve`; slower, at --temperature 1 only, and "
        "weights and vocabulary are not proved to be the right ones.",
        group="teacher",
        resume="told",
    )
    teacher_api_key_file: str | None = flag(
        None,
        "File that holds the teacher's API key; default: the environment variable TEACHER_API_KEY.",
        group="teacher",
        private=True,
    )
    teacher_timeout: float = flag(
        600.0,
        "Seconds to wait for a teacher, at the start and in a retried request; by default 30 at "
        "the start where nothing listens at an address of this machine. One attempt takes at most "
        "an equal share of it for each replica, and is then sent again in halves if the "
        "teacher is ready.",
        group="teacher",
        private=True,
    )
    teacher_unreachable: Literal["wait", "stop"] = flag(
        "wait",
        "Once a request failed and no teacher is ready any more: wait for one, up to "
        "--teacher_timeout, or stop at once. Either way a run that ends saves a checkpoint first.",
        group="teacher",
    )
    top_k_logprobs: int = flag(
        64,
        "k: the teacher's most probable tokens at each position, sent with their log-probs.",
        group="teacher",
        common=True,
        resume="same",
    )
    teacher_logprob_dtype: Literal["float16", "float32"] = flag(
        "float16",
        "Of the top-k on the wire; the next token and the tail are float32 always, and the rounded "
        "top-k is made to sum to one with them. float32 takes a third more bytes.",
        group="teacher",
        resume="told",
    )
    teacher_repeat_tolerance: float = flag(
        0.05,
        "Probability by which the teacher's scores of two rows may differ when they are scored "
        "twice, before training; at more it is refused.",
        group="teacher",
    )
    teacher_sync: str | None = flag(
        None,
        "A teacher that follows the student: ema=0.99, the share that it keeps in each step, or "
        "every=N steps. Refused: there is no way yet to send a server new weights.",
        group="teacher",
        resume="same",
    )
    accept_teacher_change: bool = flag(
        False,
        "Go on when another teacher answers at the same address in the middle of a run.",
        group="teacher",
    )
    teacher_cache: str | None = flag(
        None,
        "Folder, on a local disk, that keeps the teacher's answers for later epochs, other ranks "
        "and other runs; a request is sent once. Supervised KD and SeqKD then run without "
        "a teacher. What depends on the student's weights is not kept.",
        group="teacher",
        common=True,
        private=True,
    )
    teacher_cache_max_gb: float = flag(
        10.0,
        "Size of --teacher_cache; what was used longest ago makes room for new answers.",
        group="teacher",
        private=True,
    )

    @property
    def template_kwargs(self) -> dict[str, Any]:
        """The value of ``--teacher_chat_template_kwargs``, parsed.

        Raises:
            ConfigurationError: it is not a JSON object.
        """
        return _json_object("--teacher_chat_template_kwargs", self.teacher_chat_template_kwargs)


@dataclass
class RunFlags:
    """The trainer's own flags, and flags of transformers with another default."""

    output_dir: str | None = flag(
        None,
        "Folder for checkpoints, the final model and logs.",
        group="training",
        common=True,
        private=True,
    )
    overwrite_output_dir: bool = flag(
        False,
        "Replace the model and the checkpoints of an earlier run in --output_dir, which is refused "
        "without: they are deleted once this run's own model is loaded. With "
        "--resume_from_checkpoint auto a checkpoint that is there is gone on from.",
        group="training",
        private=True,
    )
    logging_first_step: bool = flag(True, "Log the first step.", group=None, private=True)
    logging_steps: float = flag(
        10,
        "Steps of a logging window, of which there is a line; below 1 a share of all steps. The "
        "last step ends one too.",
        group="evaluation and logs",
        private=True,
    )
    eval_steps: float | None = flag(
        None,
        "Steps between evaluations, with --eval_strategy steps; the last step has one too. "
        "Default: as --save_steps.",
        group="evaluation and logs",
    )
    remove_unused_columns: bool = flag(
        False, "Not used: rows become token ids here.", group=None, private=True
    )
    disable_tqdm: bool | None = flag(
        None,
        "A line for each log instead of a bar. Default: where there is no terminal.",
        group=None,
        private=True,
    )
    greater_is_better: bool | None = flag(
        None,
        "Whether more of --metric_for_best_model is better. Default: not of loss and divergence.",
        group=None,
    )
    loss_kernel: Literal["auto", "torch", "triton"] = flag(
        "auto",
        "Who computes the divergence: auto takes Triton on a GPU and PyTorch elsewhere; torch and "
        "triton force one.",
        group="memory and speed",
    )
    max_tokens_per_batch: int | None = flag(
        None,
        "Regroup the samples of each optimizer step by length into the fewest micro-batches of at "
        "most so many tokens, padding included; a longer sample is alone. Default: as many as "
        "--per_device_train_batch_size in each.",
        group="memory and speed",
    )
    packing: Literal["auto", "on", "off"] = flag(
        "auto",
        "Sequences of a micro-batch end to end in one row, without padding, where the model is "
        "seen to give them the same logits. auto: with flash attention, otherwise padded; on: with "
        "any (other kernels pay with a mask over the whole row), or an error; off: padded.",
        group="memory and speed",
    )
    nonfinite: Literal["stop", "skip"] = flag(
        "stop",
        "What becomes of a step whose loss or gradient is NaN or infinite. stop: the run ends "
        "before the optimizer's step, with the batch in --output_dir. skip: the weights stay as "
        "they are, and the log counts train/skipped_steps.",
        group="training",
    )
    unsafe_sandbox: bool = flag(
        False,
        "Run model-written programs also where the kernel refuses a fence (seccomp, Landlock): "
        "they have your rights then. Default: an error that names it.",
        group="evaluation and logs",
    )
    trace_steps: str | None = flag(
        None,
        "N or N-M: write trace.json in --output_dir, what went on when in these steps, for "
        "https://ui.perfetto.dev.",
        group="evaluation and logs",
        private=True,
    )
    ddp_find_unused_parameters: bool | None = flag(
        False,
        "Only for models that leave parameters out of a step (mixtures of experts).",
        group=None,
    )
    dry_run: bool = flag(
        False,
        "Show what the run would do and need, and stop. It checks flags, data and teacher, shows "
        "four rows as they are learned and what the teacher says of them, and estimates memory and "
        "traffic. It loads no weights and writes nothing.",
        group="the command itself",
        common=True,
    )


@dataclass
class TrainingFlags(RunFlags, TrainerFlags):
    """The flags of training that `sft` and `distill` share."""


@dataclass
class SFTFlags(TrainingFlags):
    """The flags of `sft`: forward KL to the data's one-hot distribution, without a teacher."""


@dataclass
class DivergenceFlags:
    """The completions to learn, and the divergence (GKD, arXiv 2306.13649)."""

    lmbda: float = flag(
        0.5,
        "Probability that a step is on-policy: 0 dataset or teacher completions, 1 student's.",
        group="method and divergence",
        common=True,
        resume="same",
    )
    beta: float = flag(
        0.5,
        "Generalized JSD: 0 is forward KL(teacher‖student), 1 reverse KL(student‖teacher), between "
        "them a mixture. Discontinuous at both ends: near 0 and 1 the interior form tends to 0, so "
        "0.9 is about 12 times weaker than 1.",
        group="method and divergence",
        common=True,
        resume="same",
    )
    temperature: float = flag(
        1.0,
        "Divides both logits in the divergence; no T² factor.",
        group="method and divergence",
        resume="same",
    )
    teacher_support: Literal["top_k", "sampled"] = flag(
        "top_k",
        "Which tokens the teacher's log-probs are of. top_k: its --top_k_logprobs most probable "
        "ones. sampled: so many draws from its whole distribution, new in each step: a gradient "
        "that is right in the mean at any number of them, but noisy; only for --beta 0.",
        group="method and divergence",
        resume="same",
    )
    tail: Literal["bucket", "renormalize"] = flag(
        "bucket",
        "What becomes of the probability off the support. bucket: one more outcome, so the value "
        "is never above the dense divergence. renormalize: dropped, and both sides rescaled over "
        "the support, as some systems do; biased, there to compare with them.",
        group="method and divergence",
        resume="same",
    )
    sft_weight: float = flag(
        0.0,
        "Share w of the hard labels: (1 − w)·divergence + w·cross-entropy on completions of the "
        "dataset or the teacher (not on the student's own). Holds the student to known good "
        "completions where the teacher is unsure or wrong.",
        group="method and divergence",
        resume="same",
    )
    request_student_top_m: int | None = flag(
        None,
        "Ask the teacher for the student's own M most probable tokens in each row too, and join "
        "them to the support. What the student likes and the teacher does not is where reverse KL "
        "and JSD are decided. Costs one forward pass without gradient, with weights as old as "
        "--rollout_staleness says; with --seq_kd the teacher scores its completions in a second "
        "call. Default: 16 for --beta 1, which is far from the dense gradient without, otherwise "
        "none.",
        group="method and divergence",
        resume="same",
    )
    seq_kd: bool = flag(
        False,
        "Off-policy completions come from the teacher (SeqKD), not from the dataset.",
        group="method and divergence",
        common=True,
        resume="same",
    )
    seq_kd_temperature: float = flag(
        0.0,
        "Sampling temperature of the teacher; 0 is greedy.",
        group="rollouts and generation",
        resume="same",
        needs=("seq_kd", True),
    )
    rollout_temperature: float = flag(
        1.0,
        "Sampling temperature of the student's rollouts.",
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
    teacher_prefetch_steps: int = flag(
        2,
        "Steps by which completions that do not depend on the student's weights are scored ahead, "
        "at least --rollout_staleness; their scores are held in memory meanwhile.",
        group="memory and speed",
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
    rollout_url: list[str] | None = flag(
        None,
        "Address of a vLLM server that writes the student's completions on other GPUs, such as "
        "http://host:8001; repeat for replicas. It gets the student's weights before each "
        "on-policy step.",
        group="rollouts and generation",
        private=True,
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
        "Seconds to wait for a server of --rollout_url.",
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

    @property
    def student_top_m(self) -> int:
        """The value of ``request_student_top_m``, or its default for this beta."""
        if self.request_student_top_m is None:
            return 16 if self.beta == 1.0 else 0
        return self.request_student_top_m


# SFT as a distillation: forward KL to the data's one-hot distribution, of the data's completions.
SFT = DivergenceFlags(lmbda=0.0, beta=0.0, teacher_prefetch_steps=0)


def divergence_flags_of(flags: RunFlags) -> DivergenceFlags:
    """Return the flags of completions and divergence; `SFT` where there is no teacher."""
    return flags if isinstance(flags, DivergenceFlags) else SFT


@dataclass
class DistillFlags(DivergenceFlags, TrainingFlags):
    """The flags of `distill`, besides those of the teacher."""


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


@dataclass(frozen=True)
class Recipe:
    """The flags that `sft` and `distill` share, besides those of training."""

    model: ModelArguments
    adapters: AdapterArguments
    dataset: DatasetArguments
    data: DataArguments
    generation: GenerationArguments
    template: TemplateArguments = field(default_factory=TemplateArguments)

    @property
    def flags(self) -> tuple[Any, ...]:
        """The dataclasses of this recipe, in the order of `config.commands`."""
        return (
            self.model, self.adapters, self.dataset, self.data, self.generation, self.template,
        )  # fmt: skip


def traced_steps(args: RunFlags) -> tuple[int, int] | None:
    """Return the first and last step of ``--trace_steps``, counted from 1; None without it.

    Raises:
        ConfigurationError: it is not a range of steps.
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


def uses_deepspeed(args: TrainingFlags | TrainingArguments) -> bool:
    """Return whether ``--deepspeed`` or accelerate's launcher turns DeepSpeed on."""
    return bool(args.deepspeed) or os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"


def uses_fsdp(args: TrainingFlags | TrainingArguments) -> bool:
    """Return whether ``--fsdp`` or accelerate's launcher turns FSDP on."""
    return bool(args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP") == "true"

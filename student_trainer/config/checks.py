"""The checks of flags, alone and together, that need no torch.

`config.machine` has the checks that need torch and transformers.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from shared.api_keys import check_key, read_keys
from shared.errors import ConfigurationError
from shared.model_names import describe_missing
from student_trainer.config.arguments import (
    AdapterArguments,
    DataArguments,
    DatasetArguments,
    DistillFlags,
    EvaluateArguments,
    GenerationArguments,
    MergeArguments,
    ModelArguments,
    Recipe,
    TeacherArguments,
    TrainingFlags,
    traced_steps,
    uses_deepspeed,
    uses_fsdp,
)
from student_trainer.config.flags import flags_of
from student_trainer.config.suites import FORMS, HUB
from student_trainer.config.trainer_flags import trainer_flags

logger = logging.getLogger(__name__)

_COUNTS = (
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
)
_METRICS = ("loss", "divergence", "pass@1", "exact_match")
# Flags of transformers that have no effect here, or not the one that they promise.
UNSUPPORTED = {
    "label_smoothing_factor": "has no effect on a divergence; drop it",
    "use_liger_kernel": "replaces the forward pass; the loss here is fused already: drop it",
    "auto_find_batch_size": "would mix generation batches of two sizes; give the batch size",
    "dataloader_num_workers": "has no effect: rows are token ids in memory; drop it",
    "enable_jit_checkpoint": "is not needed: SIGTERM saves a checkpoint anyway; drop it",
    "ignore_data_skip": "would learn rows twice after a checkpoint; drop it",
    "bf16_full_eval": "has no effect: evaluation computes as training does; use --bf16",
    "fp16_full_eval": "has no effect: evaluation computes as training does; use --fp16",
    "train_sampling_strategy": "is not supported: the order is random, or fixed by --seed; drop it",
}


def check_recipe(recipe: Recipe, args: TrainingFlags) -> None:
    """Check the flags that `sft` and `distill` share.

    Raises:
        ConfigurationError: a value or a combination cannot work.
    """
    model, adapters, dataset, data = recipe.model, recipe.adapters, recipe.dataset, recipe.data
    if not args.output_dir:
        raise ConfigurationError("--output_dir is missing: give a folder for the trained model")
    if uses_deepspeed(args) and importlib.util.find_spec("deepspeed") is None:
        raise ConfigurationError("DeepSpeed is not installed here: pip install deepspeed")
    check_model(model)
    check_generation(recipe.generation)
    check_adapters(adapters)
    check_datasets(dataset, data, args)
    if args.unsafe_sandbox and not data.eval_dataset_name:
        raise ConfigurationError(
            "--unsafe_sandbox has no effect without --eval_dataset_name, whose programs it is for"
        )
    if adapters.use_peft and model.loaded is None and holds_adapters(model.model_name_or_path):
        raise ConfigurationError(
            f"--use_peft on {model.model_name_or_path}, which holds adapters itself: the new ones "
            "would name their base without these. First run `student-trainer merge "
            f"--model_name_or_path {model.model_name_or_path} --output_dir DIR`, and train on DIR"
        )
    if args.eval_strategy != "no" and not data.eval_dataset_name:
        raise ConfigurationError(f"--eval_strategy {args.eval_strategy} needs --eval_dataset_name")
    if data.assistant_only_loss:
        logger.warning("--assistant_only_loss is the old name of --assistant_turns all")
    if data.max_length is not None and data.max_length < 2:
        raise ConfigurationError(f"--max_length {data.max_length} must be at least 2")
    for name in _COUNTS:
        if getattr(args, name) < 1:
            raise ConfigurationError(f"--{name} {getattr(args, name)} must be at least 1")
    budget = args.max_tokens_per_batch
    if budget is not None and budget < 1:
        raise ConfigurationError(f"--max_tokens_per_batch {budget} must be at least 1")
    if budget is not None and uses_deepspeed(args):
        raise ConfigurationError(
            f"--max_tokens_per_batch {budget}: DeepSpeed counts micro-batches by itself and would "
            "step between them; drop it"
        )
    best = (args.metric_for_best_model or "loss").removeprefix("eval_")
    if best not in _METRICS:
        raise ConfigurationError(
            f"--metric_for_best_model {args.metric_for_best_model} is not one of "
            f"{', '.join(_METRICS)}"
        )
    for name, remedy in UNSUPPORTED.items():
        value = getattr(args, name)
        if value != trainer_flags()[name].default:
            raise ConfigurationError(f"--{name} {value} {remedy}")
    traced_steps(args)
    if args.nonfinite == "skip" and (args.fp16 or uses_deepspeed(args)):
        raise ConfigurationError(
            "--nonfinite skip: the loss scaler of --fp16 skips steps by itself, and so does "
            "DeepSpeed; drop it"
        )
    if args.loss_kernel == "triton" and importlib.util.find_spec("triton") is None:
        raise ConfigurationError("--loss_kernel triton: not installed; pip install triton")


def check_datasets(dataset: DatasetArguments, data: DataArguments, args: TrainingFlags) -> None:
    """Check the names and weights of datasets, and how they are read.

    Raises:
        ConfigurationError: one of them cannot work.
    """
    names, weights = dataset.dataset_name, data.dataset_weights
    _require("".join(names), "--dataset_name", "a file, a folder, a glob or a Hub id")
    if not all(names):
        raise ConfigurationError("--dataset_name holds an empty name; drop it")
    if weights is not None:
        given = f"--dataset_weights {' '.join(f'{weight:g}' for weight in weights)}"
        if len(names) == 1:
            raise ConfigurationError(
                f"{given} has no effect on one dataset; drop it, or give several --dataset_name"
            )
        if len(weights) != len(names):
            raise ConfigurationError(
                f"{given}: {len(weights)} weights for {len(names)} datasets; give one for each"
            )
        if not all(0 < weight < float("inf") for weight in weights):
            raise ConfigurationError(
                f"{given}: each must be above 0; leave out a dataset that is not wanted"
            )
    for name in ("dataset_num_proc", "shuffle_buffer_size"):
        value = getattr(data, name)
        if value is not None and value < 1:
            raise ConfigurationError(f"--{name} {value} must be at least 1")
    if data.prompt_column == data.completion_column:
        raise ConfigurationError(
            f"--prompt_column and --completion_column are both {data.prompt_column}; the "
            "completion must be a column of its own"
        )
    if not data.streaming:
        if data.shuffle_buffer_size is not None:
            raise ConfigurationError(
                f"--shuffle_buffer_size {data.shuffle_buffer_size} has no effect without "
                "--streaming: all rows are shuffled; drop it"
            )
        return
    if args.max_steps <= 0:
        raise ConfigurationError(
            "--streaming needs --max_steps: how many rows there are is not known beforehand"
        )
    if data.dataset_num_proc is not None:
        raise ConfigurationError(
            f"--dataset_num_proc {data.dataset_num_proc} has no effect with --streaming, which "
            "tokenizes rows as they come; drop it"
        )
    for name in ("eval_strategy", "save_strategy", "logging_strategy"):
        if getattr(args, name) == "epoch":
            raise ConfigurationError(
                f"--{name} epoch: with --streaming the run has no epochs; use steps"
            )


def check_model(model: ModelArguments) -> None:
    if model.loaded is not None:
        return
    _require(model.model_name_or_path, "--model_name_or_path", "a folder or a Hub id")
    name = model.model_name_or_path
    if Path(name).is_dir():
        if not (Path(name) / "config.json").exists() and not holds_adapters(name):
            raise ConfigurationError(f"--model_name_or_path {name} has no config.json")
    elif missing := describe_missing(name):
        raise ConfigurationError(f"--model_name_or_path: {missing}; give a folder or a Hub id")


def holds_adapters(folder: str) -> bool:
    """Return whether a model folder holds LoRA adapters alone, without their base model."""
    path = Path(folder)
    return (path / "adapter_config.json").exists() and not (path / "config.json").exists()


def check_adapters(adapters: AdapterArguments) -> None:
    if adapters.load_in_4bit and not adapters.use_peft:
        raise ConfigurationError("--load_in_4bit trains adapters only: add --use_peft")
    _check_needs(adapters)
    if adapters.lora_r < 1:
        raise ConfigurationError(f"--lora_r {adapters.lora_r} must be at least 1")


def check_merge(args: MergeArguments) -> None:
    """Check the flags of `merge`.

    Raises:
        ConfigurationError: there is nothing to merge, or the output folder is in use.
    """
    _require(args.model_name_or_path, "--model_name_or_path", "a folder of LoRA adapters")
    _require(args.output_dir, "--output_dir", "a new folder for the merged model")
    if not Path(args.model_name_or_path).exists():
        raise ConfigurationError(
            f"--model_name_or_path: folder {args.model_name_or_path} does not exist; give a folder "
            "of LoRA adapters"
        )
    if not holds_adapters(args.model_name_or_path):
        raise ConfigurationError(
            f"--model_name_or_path {args.model_name_or_path} holds no LoRA adapters to merge"
        )
    output = Path(args.output_dir)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigurationError(f"--output_dir {output} exists already; give a new folder")


def check_distillation(recipe: Recipe, teacher: TeacherArguments, args: DistillFlags) -> None:
    """Check all flags of `distill`.

    Raises:
        ConfigurationError: a value or a combination cannot work.
    """
    check_distill(args, teacher)
    check_rollouts(args, recipe.adapters)
    check_recipe(recipe, args)


def check_distill(args: DistillFlags, teacher: TeacherArguments) -> None:
    """Check the method and the teacher of a distillation.

    Raises:
        ConfigurationError: a value is out of range, or two flags contradict each other.
    """
    for name in ("lmbda", "beta"):
        value = getattr(args, name)
        if not 0.0 <= value <= 1.0:
            raise ConfigurationError(f"--{name} {value} must be from 0 to 1")
    if not 0 < args.temperature < float("inf"):
        raise ConfigurationError(f"--temperature {args.temperature} must be above 0")
    if not 0 < args.rollout_temperature < float("inf"):
        raise ConfigurationError(
            f"--rollout_temperature {args.rollout_temperature} must be above 0"
        )
    if not 0 <= args.seq_kd_temperature < float("inf"):
        raise ConfigurationError(f"--seq_kd_temperature {args.seq_kd_temperature} is below 0")
    if not 0.0 <= args.sft_weight < 1.0:
        raise ConfigurationError(
            f"--sft_weight {args.sft_weight} must be 0 or above and below 1; without a teacher's "
            "share there is `student-trainer sft`"
        )
    if args.sft_weight > 0 and args.lmbda == 1.0:
        raise ConfigurationError(
            f"--sft_weight {args.sft_weight} has no effect with --lmbda 1: the student's own "
            "completions are no labels. Drop it, or lower --lmbda"
        )
    if args.sft_weight > 0 and args.temperature != 1.0:
        raise ConfigurationError(
            f"--sft_weight {args.sft_weight} needs --temperature 1: the cross-entropy shares the "
            f"divergence's softmax, and at {args.temperature} it is not the data's likelihood"
        )
    if args.student_top_m < 0:
        raise ConfigurationError(
            f"--request_student_top_m {args.student_top_m} must be 0 (none) or above"
        )
    _check_support(args, teacher)
    _check_ahead(args)
    if args.seq_kd and args.lmbda == 1.0:
        raise ConfigurationError(
            "--seq_kd has no effect with --lmbda 1: every step is on-policy. "
            "Drop --seq_kd, or lower --lmbda"
        )
    _check_needs(args)
    if teacher.teacher_protocol == "vllm" and args.temperature != 1.0:
        raise ConfigurationError(
            f"--temperature {args.temperature}: vLLM never applies a temperature to the log-probs "
            "of a prompt, so --teacher_protocol vllm takes 1.0 only; use `teacher-server serve`"
        )
    check_teacher(teacher)


def _check_support(args: DistillFlags, teacher: TeacherArguments) -> None:
    """Check what ``--teacher_support sampled`` cannot go with: a beta, ``--tail``, a cache."""
    if args.teacher_support != "sampled":
        return
    if args.beta != 0.0:
        raise ConfigurationError(
            f"--teacher_support sampled estimates forward KL alone, and --beta is {args.beta}: set "
            "--beta 0, or use --teacher_support top_k"
        )
    if args.tail != "bucket":
        raise ConfigurationError(
            f"--tail {args.tail} has no effect with --teacher_support sampled, which has no tail; "
            "drop it"
        )
    if args.student_top_m:
        raise ConfigurationError(
            f"--request_student_top_m {args.student_top_m} would bias --teacher_support "
            "sampled: drop it, or use --teacher_support top_k"
        )
    if teacher.teacher_cache is not None:
        raise ConfigurationError(
            f"--teacher_cache {teacher.teacher_cache} keeps nothing of --teacher_support sampled, "
            "which is drawn anew in each step: drop it, or use --teacher_support top_k"
        )
    if teacher.teacher_protocol == "vllm":
        raise ConfigurationError(
            "--teacher_support sampled: a stock vLLM draws no support, so --teacher_protocol vllm "
            "takes top_k only; use `teacher-server serve`"
        )


def _check_ahead(args: DistillFlags) -> None:
    """Check by how many steps rollouts and scores run ahead."""
    for name in ("rollout_staleness", "teacher_prefetch_steps"):
        if getattr(args, name) < 0:
            raise ConfigurationError(f"--{name} {getattr(args, name)} must be 0 or above")
    proposes = args.student_top_m > 0 and not args.seq_kd
    if args.rollout_staleness and args.lmbda == 0.0 and not proposes:
        raise ConfigurationError(
            f"--rollout_staleness {args.rollout_staleness} has no effect with --lmbda 0: there are "
            "no rollouts. Drop it; --teacher_prefetch_steps is for what the student does not write"
        )
    prefetch = args.teacher_prefetch_steps
    if prefetch == DistillFlags.teacher_prefetch_steps:
        return
    if args.lmbda == 1.0:
        raise ConfigurationError(
            f"--teacher_prefetch_steps {prefetch} has no effect with --lmbda 1: every step is "
            "on-policy. Drop it; --rollout_staleness is for rollouts"
        )
    if proposes:
        raise ConfigurationError(
            f"--teacher_prefetch_steps {prefetch} has no effect with --request_student_top_m "
            f"{args.student_top_m} (16 for --beta 1, if not given): the student proposes ids for "
            "every step. Drop it; --rollout_staleness is for what depends on the student's weights"
        )


def check_rollouts(args: DistillFlags, adapters: AdapterArguments) -> None:
    """Check the flags of --rollout_engine vllm.

    Raises:
        ConfigurationError: it is not installed, or a combination cannot work.
    """
    _check_engine(args)
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


def _check_engine(args: DistillFlags | EvaluateArguments) -> None:
    _check_needs(args)
    if args.rollout_engine != "vllm":
        return
    share = args.vllm_gpu_memory_utilization
    if importlib.util.find_spec("vllm") is None:
        raise ConfigurationError("--rollout_engine vllm: not installed; pip install '.[vllm]'")
    if not 0 < share < 1:
        raise ConfigurationError(f"--vllm_gpu_memory_utilization {share} must be between 0 and 1")


def check_evaluate(
    model: ModelArguments,
    dataset: DatasetArguments,
    generation: GenerationArguments,
    teacher: TeacherArguments,
    args: EvaluateArguments,
) -> None:
    """Check the flags of `evaluate`.

    Raises:
        ConfigurationError: a value or a combination cannot work.
    """
    check_model(model)
    check_generation(generation)
    _check_engine(args)
    if args.rollout_engine == "vllm" and not (
        args.temperature == 0 or 0.01 <= args.temperature <= 2
    ):
        raise ConfigurationError(
            f"--temperature {args.temperature}: vLLM samples from 0.01 to 2, or greedily at 0; use "
            "--rollout_engine transformers"
        )
    if not 0.0 <= args.beta <= 1.0:
        raise ConfigurationError(f"--beta {args.beta} must be from 0 to 1")
    if teacher.teacher_url:
        check_teacher(teacher)
    elif teacher != TeacherArguments() or args.beta != EvaluateArguments.beta:
        raise ConfigurationError(
            "a teacher's flags and --beta have no effect without --teacher_url"
        )
    if len(dataset.dataset_name) > 1:
        raise ConfigurationError(
            f"--dataset_name {' '.join(dataset.dataset_name)}: give `evaluate` one at a time"
        )
    _check_suite(args.suite, dataset)
    _require(args.output_dir, "--output_dir", "a folder for results.json and samples.jsonl")
    if not 0 <= args.temperature < float("inf"):
        raise ConfigurationError(f"--temperature {args.temperature} must be 0 (greedy) or above")
    if args.n < 1 or (args.limit is not None and args.limit < 1):
        raise ConfigurationError(f"--n {args.n} and --limit {args.limit} must be at least 1")
    if args.n > 1 and args.temperature == 0:
        raise ConfigurationError(
            f"--n {args.n} greedy completions are all the same; add --temperature"
        )
    if not args.check_timeout > 0:
        raise ConfigurationError(f"--check_timeout {args.check_timeout} must be above 0")


def _check_suite(suite: str, dataset: DatasetArguments) -> None:
    if suite in FORMS:
        if suite not in HUB:
            _require(
                "".join(dataset.dataset_name),
                "--dataset_name",
                "HumanEval.jsonl.gz, GSM8K or rows with checkers; or --suite humaneval or gsm8k, "
                "which come from the Hub",
            )
    elif dataset.dataset_name:
        raise ConfigurationError(
            f"--suite {suite} with --dataset_name must be one of {', '.join(FORMS)}: what "
            f"{dataset.dataset_name[0]} holds"
        )
    elif suite == "mini_humaneval":
        raise ConfigurationError(
            "--suite mini_humaneval is made, not published: in a checkout run `python -m "
            "examples.mini_humaneval.prepare --output_dir DIR`, and give --suite DIR/held_out.jsonl"
        )
    elif not Path(suite).expanduser().exists():
        raise ConfigurationError(
            f"--suite {suite}: no such file or folder, and neither humaneval nor gsm8k"
        )


def check_generation(generation: GenerationArguments) -> None:
    if generation.max_new_tokens < 1:
        raise ConfigurationError(f"--max_new_tokens {generation.max_new_tokens} must be at least 1")
    if generation.generation_batch_size is not None and generation.generation_batch_size < 1:
        raise ConfigurationError(
            f"--generation_batch_size {generation.generation_batch_size} must be at least 1"
        )


def check_teacher(teacher: TeacherArguments) -> None:
    if not teacher.teacher_url:
        raise ConfigurationError(
            "--teacher_url is missing: start `teacher-server serve MODEL` and give its address, "
            "such as --teacher_url http://localhost:8000"
        )
    for url in teacher.teacher_url:
        if "@" in url:  # the message must not show the password
            raise ConfigurationError(
                "--teacher_url holds a user or a password, which every log would show; give a key "
                "by the environment variable TEACHER_API_KEY or by --teacher_api_key_file"
            )
        if not _is_address(url):
            raise ConfigurationError(f"--teacher_url {url!r} must look like http://host:8000")
    api_key_of(teacher)
    if teacher.top_k_logprobs < 1:
        raise ConfigurationError(f"--top_k_logprobs {teacher.top_k_logprobs} must be at least 1")
    dtype = teacher.teacher_logprob_dtype
    if teacher.teacher_protocol == "vllm" and dtype != TeacherArguments.teacher_logprob_dtype:
        raise ConfigurationError(
            f"--teacher_logprob_dtype {dtype} has no effect with --teacher_protocol vllm, which "
            "sends decimal numbers; drop it"
        )
    if not teacher.teacher_timeout > 0:
        raise ConfigurationError(f"--teacher_timeout {teacher.teacher_timeout} must be above 0")
    if not teacher.teacher_repeat_tolerance >= 0:
        raise ConfigurationError(
            f"--teacher_repeat_tolerance {teacher.teacher_repeat_tolerance} must be 0 or above"
        )
    _check_cache(teacher)


def _check_cache(teacher: TeacherArguments) -> None:
    if teacher.teacher_cache is None:
        if teacher.teacher_cache_max_gb != TeacherArguments.teacher_cache_max_gb:
            raise ConfigurationError(
                "--teacher_cache_max_gb has no effect without --teacher_cache; drop it"
            )
        return
    if not 0 < teacher.teacher_cache_max_gb < float("inf"):
        raise ConfigurationError(
            f"--teacher_cache_max_gb {teacher.teacher_cache_max_gb} must be above 0"
        )
    if teacher.teacher_protocol == "vllm":
        raise ConfigurationError(
            "--teacher_cache needs a teacher that tells which weights it has: a stock vLLM does "
            "not. Use `teacher-server serve`, or drop it"
        )
    if teacher.accept_teacher_change:
        raise ConfigurationError(
            "--teacher_cache keeps answers of one teacher apart from another's; drop it, or "
            "--accept_teacher_change"
        )


def check_precompute(args: DistillFlags, teacher: TeacherArguments, data: DataArguments) -> None:
    """Check the flags of `precompute`.

    Raises:
        ConfigurationError: nothing can be requested before there is a student.
    """
    if teacher.teacher_cache is None:
        raise ConfigurationError("--teacher_cache is missing: give a folder for the answers")
    if args.lmbda == 1.0:
        raise ConfigurationError(
            "--lmbda 1: every step is on-policy, and what the student writes is not known before "
            "it trains; there is nothing to precompute"
        )
    if data.streaming:
        raise ConfigurationError(
            "--streaming: precompute asks the teacher about all rows, and a stream has no end; "
            "drop it"
        )
    if args.student_top_m:
        raise ConfigurationError(
            f"--request_student_top_m {args.student_top_m} (16 for --beta 1, if not given): the "
            "ids depend on the student's weights, and cannot be asked for before it trains; give 0"
        )


def api_key_of(teacher: TeacherArguments) -> str | None:
    """Return the teacher's key, from ``--teacher_api_key_file`` or else from the environment.

    It is in no argument, so that nothing that saves or logs arguments can hold it.

    Raises:
        ConfigurationError: a file without a key or with several, or an invalid key.
    """
    path = teacher.teacher_api_key_file
    if path is None:
        key = os.environ.get("TEACHER_API_KEY")
        return check_key(key, "TEACHER_API_KEY") if key else None
    first, *others = read_keys(path, "--teacher_api_key_file")
    if others:
        raise ConfigurationError(
            f"--teacher_api_key_file {path} holds {1 + len(others)} keys; the trainer sends one"
        )
    return first


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        _ = parts.port  # raises for an invalid port
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname) and url.isprintable()


def _require(value: str | None, flag: str, what: str) -> None:
    if not value:
        raise ConfigurationError(f"{flag} is missing: give {what}")


def _check_needs(part: Any) -> None:
    """Check that no flag is given without the one that it needs, see `flags.flag`.

    Raises:
        ConfigurationError: a flag is given alone; the message names both.
    """
    for one in flags_of(type(part)).values():
        if one.needs is None or getattr(part, one.name) == one.default:
            continue
        name, value = one.needs
        if getattr(part, name) != value:
            needed = f"--{name}" if value is True else f"--{name} {value}"
            raise ConfigurationError(f"--{one.name} has no effect without {needed}")

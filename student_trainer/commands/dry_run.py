"""The flag `--dry_run`: print what a run would do, without doing it."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from accelerate import PartialState

from shared.printable import printable
from student_trainer.commands.dry_run_rows import describe_rows
from student_trainer.commands.dry_run_teacher import (
    describe_scores,
    describe_teacher,
    describe_traffic,
)
from student_trainer.config.arguments import (
    TeacherArguments,
    divergence_flags_of,
    uses_deepspeed,
    uses_fsdp,
)
from student_trainer.config.training_arguments import CommonTrainingArguments, DistillArguments
from student_trainer.data.end_tokens import compare_ends
from student_trainer.data.stream import ExampleStream
from student_trainer.data.turn import describe_mode
from student_trainer.pipeline.method import DistillationConfig
from student_trainer.runtime.terminal import has_colours, painted, readable_size
from student_trainer.teacher.named import Teachers
from student_trainer.training.counting import completions_of_step, order_of
from student_trainer.training.memory import Memory, estimate_memory
from student_trainer.training.model_card import method_of, sampling_of

if TYPE_CHECKING:
    from student_trainer.config.arguments import Recipe
    from student_trainer.training.recipe import Prepared

_STREAM_ROWS = 64  # first rows of a stream, which stand for all


def dry_run(
    recipe: Recipe,
    prepared: Prepared,
    args: CommonTrainingArguments,
    *,
    teachers: Teachers | None = None,
    teacher_flags: TeacherArguments | None = None,
    planned: int | None = None,
) -> None:
    """Print settings, memory, traffic, and a few rows with the teacher's scores of them.

    Args:
        teachers: connected; None for SFT.
        teacher_flags: None for SFT.
        planned: number of sequences that `precompute` would request, if that is the command.

    Raises:
        ConfigurationError: the adapters do not fit the model.
        TeacherError: the teacher does not score the rows.
    """
    prepared = _first_of_stream(prepared)
    memory = memory_of(recipe, prepared, args)
    student_top_m = divergence_flags_of(args).student_top_m
    scores = [] if teachers is None else describe_scores(teachers, prepared, student_top_m)
    _, most = describe_tokens(prepared, args)
    colours = has_colours(sys.stdout)
    sections = [
        _table(
            "Dry run: no weights are loaded, nothing is trained, nothing is written",
            _settings(recipe, prepared, args, memory, teachers, planned),
        ),
        _table(
            f"Memory of one process, without activations{_sharded(args)}", _memory(memory, args)
        ),
    ]
    if teachers is not None and teacher_flags is not None:
        traffic = describe_traffic(teachers, teacher_flags, args, most)
        sections.append(_table("Teacher", [*scores, *traffic]))
    sections.append("\n".join(describe_rows(prepared, colours)))
    for section in sections if PartialState().is_main_process else ():
        title, _, rest = section.partition("\n")
        sys.stdout.write(f"{painted(title, 'bold', colours)}\n{rest}\n\n")
    PartialState().wait_for_everyone()  # the group must not end while a rank still uses it
    PartialState().destroy_process_group()


def _table(title: str, rows: Sequence[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in rows) + 2
    return "\n".join([title, *(f"  {name.ljust(width)}{printable(text)}" for name, text in rows)])


def _settings(
    recipe: Recipe,
    prepared: Prepared,
    args: CommonTrainingArguments,
    memory: Memory,
    teachers: Teachers | None,
    planned: int | None,
) -> list[tuple[str, str]]:
    lines = [("method", describe_method(args))]
    if isinstance(args, DistillArguments):
        lines.append(("divergence", describe_divergence(args, prepared.method)))
        lines += [("rollouts", sampling)] if (sampling := sampling_of(args)) else []
    lines.append(("student", describe_student(recipe, memory)))
    for name, teacher in [] if teachers is None else teachers.items():
        lines += describe_teacher(name, teacher, prepared)
        ends = compare_ends(prepared.tokenizer, prepared.method.stop_ids, teacher.info)
        lines += [] if ends is None else [("end tokens", ends)]
    lines += _data(prepared, streaming=recipe.data.streaming)
    lines += _template(prepared)
    if planned is not None:
        lines.append(("requests", f"{planned:,} for the teacher, whatever --max_steps says"))
    lines.append(("updates", describe_updates(prepared, args, streaming=recipe.data.streaming)))
    lines.append(("tokens a step", describe_tokens(prepared, args)[0]))
    lines.append((
        "learning rate",
        f"{args.learning_rate:g}, {args.lr_scheduler_type.value}, "
        f"{args.warmup_steps:g} warm-up steps; {_name(args.optim)}",
    ))  # fmt: skip
    lines.append(("output", str(args.output_dir)))
    return lines


def _name(choice: str) -> str:
    """Return the text of a flag's value, which transformers may turn into an Enum."""
    return str(getattr(choice, "value", choice))


def describe_student(recipe: Recipe, memory: Memory | None) -> str:
    """Return the student's name, size and dtype, and which of its weights are trained."""
    trained, adapters = "all weights", recipe.adapters
    if adapters.use_peft:
        count = f"{memory.trainable:,} of " if memory is not None else ""
        trained = f"{count}LoRA, rank {adapters.lora_r}, alpha {adapters.alpha}"
    model = recipe.model
    size = "" if memory is None else f"{memory.parameters:,} parameters, "
    return f"{model.model_name_or_path}: {size}{model.torch_dtype}; trained are {trained}"


def describe_method(args: CommonTrainingArguments) -> str:
    """Return the method's name, and the flags that make it."""
    name = method_of(args)
    if isinstance(args, DistillArguments):
        name += f" (--lmbda {args.lmbda:g}{', --seq_kd' if args.seq_kd else ''})"
        if args.sft_weight:
            name += f", {args.sft_weight:g} of it cross-entropy"
    return name


def describe_divergence(args: DistillArguments, method: DistillationConfig) -> str:
    """Return the divergence that is learned, and the support it is computed on."""
    kind = {0.0: "forward KL(teacher||student)", 1.0: "reverse KL(student||teacher)"}
    support = f"{method.top_k} draws" if method.sampled else f"top {method.top_k}"
    if args.student_top_m:
        support += f" and the student's top {args.student_top_m}"
    tail = "" if method.sampled else f", tail: {args.tail}"
    return (
        f"{kind.get(args.beta, 'generalized JSD')} (--beta {args.beta:g}) at temperature "
        f"{args.temperature:g}; {support}{tail}"
    )


def _data(prepared: Prepared, *, streaming: bool) -> list[tuple[str, str]]:
    held_out = "none" if prepared.held_out is None else f"{len(prepared.held_out):,}"
    prompts = [len(example.prompt_ids) for example in prepared.train]
    first = "a stream, of which are seen " if streaming else ""
    text = f"{first}{len(prompts):,} rows, {held_out} held out; prompts of {_range(prompts)} tokens"
    completions = _completion_lengths(prepared)
    if completions:
        text += f", completions of {_range(completions)}"
    return [("data", text)]


def _template(prepared: Prepared) -> list[tuple[str, str]]:
    """Return the mode of the chat template in the first prompt, if a template made it."""
    template, prompt = prepared.template, prepared.train[0].prompt
    if template.encoder.find_control_token(prompt) is None:
        return []
    text = describe_mode(template, prompt)
    if template.options.kwargs:
        text += f"; options {json.dumps(template.options.kwargs)}"
    if template.prints_date:
        text += f"; it prints the date {template.options.today}"
    return [("chat template", text)]


def _range(numbers: Sequence[int]) -> str:
    mean = sum(numbers) / len(numbers)
    return f"{min(numbers):,} to {max(numbers):,} (mean {mean:,.1f})"


def _completion_lengths(prepared: Prepared) -> list[int]:
    """Return the learned tokens of each row that has a completion of its own."""
    samples = [example.sample for example in prepared.train if example.sample is not None]
    return [int(sample.completion_mask.sum()) for sample in samples]


def _steps(prepared: Prepared, args: CommonTrainingArguments) -> tuple[int, int]:
    """Return the optimizer steps of the run, and of an epoch."""
    repeats = divergence_flags_of(args).num_generations
    of_epoch = order_of(len(prepared.train), args, repeats=repeats).steps_per_epoch
    if args.max_steps > 0:
        return args.max_steps, of_epoch
    return math.ceil(args.num_train_epochs * of_epoch), of_epoch


def describe_updates(prepared: Prepared, args: CommonTrainingArguments, *, streaming: bool) -> str:
    """Return the optimizer steps, and the rows of each."""
    steps, of_epoch = _steps(prepared, args)
    batch, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
    epoch = "" if streaming else f", {of_epoch:,} an epoch"
    count, generations = completions_of_step(args), divergence_flags_of(args).num_generations
    learned = f"{count:,} rows each"
    if generations > 1:
        learned = f"{count // generations:,} prompts x {generations} completions each"
    return (
        f"{steps:,}{epoch}; {learned}: "
        f"{batch} a micro-batch x {accumulation} accumulated x {args.world_size} processes"
    )


def describe_tokens(prepared: Prepared, args: CommonTrainingArguments) -> tuple[str, float]:
    """Return the completion tokens of a step as text, and the largest mean number of them."""
    generations = divergence_flags_of(args).num_generations
    rows = min(completions_of_step(args), len(prepared.train) * generations)
    method, lengths = prepared.method, _completion_lengths(prepared)
    written = rows * method.max_new_tokens
    if method.seq_kd or method.lmbda == 1:
        return f"at most {written:,} of the {'teacher' if method.lmbda < 1 else 'student'}", written
    own = rows * sum(lengths) / len(lengths)
    if method.lmbda == 0:
        return f"about {own:,.0f} of the dataset", own
    text = f"about {own:,.0f} of the dataset, or at most {written:,} of the student"
    return text, (1 - method.lmbda) * own + method.lmbda * written


def micro_batch_tokens(prepared: Prepared, args: CommonTrainingArguments) -> int:
    """Return the largest number of completion tokens in a micro-batch."""
    if args.max_tokens_per_batch is not None:
        return args.max_tokens_per_batch
    method, longest = prepared.method, max(_completion_lengths(prepared), default=0)
    if method.seq_kd or method.lmbda > 0:
        longest = max(longest, method.max_new_tokens)
    return args.per_device_train_batch_size * longest


def memory_of(recipe: Recipe, prepared: Prepared, args: CommonTrainingArguments) -> Memory:
    """Return the memory of a step with the longest rows, as dry run and run both tell it.

    Raises:
        ConfigurationError: the adapters do not fit the model.
    """
    tokens = micro_batch_tokens(_first_of_stream(prepared), args)
    return estimate_memory(recipe.model, recipe.adapters, args, tokens=tokens)


def describe_memory(memory: Memory, args: CommonTrainingArguments) -> dict[str, str]:
    """Return the size of each part of a step's memory, and of all together."""
    optimizer = f"not known of --optim {_name(args.optim)} without a GPU"
    if memory.optimizer is not None:
        optimizer = readable_size(memory.optimizer)
    parts = {"weights": readable_size(memory.weights), "gradients": readable_size(memory.gradients)}
    if memory.buckets:
        parts["DDP's buckets"] = readable_size(memory.buckets)
    parts["optimizer"] = optimizer
    if memory.casts:
        precision = "bf16" if args.bf16 else "fp16"
        parts[f"--{precision} copies"] = f"up to {readable_size(memory.casts)}"
    parts["loss"] = f"up to {readable_size(memory.loss)}"
    return {**parts, "together": readable_size(memory.total)}


def _memory(memory: Memory, args: CommonTrainingArguments) -> list[tuple[str, str]]:
    parts = describe_memory(memory, args)
    parts["loss"] += (
        ": a chunk of logits, and an output layer's gradient unless it is added in place"
    )
    lines = list(parts.items())
    if isinstance(args, DistillArguments) and args.rollout_engine == "vllm":
        share = f"{args.vllm_gpu_memory_utilization:.0%} of the GPU, beside all this"
        lines.append(("vLLM's engine", share))
    return lines


def _first_of_stream(prepared: Prepared) -> Prepared:
    """Return a stream's first rows alone, which it keeps for the run; others are all returned."""
    if isinstance(prepared.train, ExampleStream):
        return replace(prepared, train=prepared.train[:_STREAM_ROWS])
    return prepared


def _sharded(args: CommonTrainingArguments) -> str:
    return ", before it is sharded" if uses_fsdp(args) or uses_deepspeed(args) else ""

"""`--dry_run`: what a run would do, and nothing of it done."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from accelerate import PartialState
from numpy.typing import NDArray

from shared.errors import ConfigurationError
from shared.printable import printable
from shared.text import Ids, completion_text
from student_trainer.config.arguments import TeacherArguments, uses_deepspeed, uses_fsdp
from student_trainer.config.training_arguments import CommonTrainingArguments, DistillArguments
from student_trainer.data.end_tokens import compare_ends
from student_trainer.data.order import TrainingOrder
from student_trainer.data.sample import Example, Sample
from student_trainer.data.stream import ExampleStream
from student_trainer.data.template import describe_mode
from student_trainer.pipeline.pipeline import DistillationConfig
from student_trainer.pipeline.targets import ScoredSample, sparse_distribution
from student_trainer.runtime.terminal import has_colours, painted
from student_trainer.teacher.base import Teacher
from student_trainer.training.memory import Memory, estimate_memory
from student_trainer.training.model_card import method_of

if TYPE_CHECKING:
    from student_trainer.config.arguments import Recipe
    from student_trainer.training.recipe import Prepared

_ROWS = 4
_OF_STREAM = 64  # rows that a dry run looks at
_SECONDS = 30.0
_CHARACTERS = 600  # of a prompt or a completion that are shown


def asked_briefly(teacher: TeacherArguments) -> TeacherArguments:
    """A teacher that is not there is told soon, unless told to wait; no cache is read or made."""
    usual = teacher.teacher_timeout == TeacherArguments.teacher_timeout
    seconds = _SECONDS if usual else teacher.teacher_timeout
    return replace(teacher, teacher_timeout=seconds, teacher_cache=None)


def dry_run(
    recipe: Recipe,
    prepared: Prepared,
    args: CommonTrainingArguments,
    *,
    teacher: Teacher | None = None,
    asked: TeacherArguments | None = None,
    questions: int | None = None,
) -> None:
    """Print settings, memory, traffic and a few rows with what the teacher says of them.

    Args:
        teacher: connected; None for SFT.
        asked: the teacher's flags; None for SFT.
        questions: what `precompute` would ask, if that is the command.

    Raises:
        ConfigurationError: --output_dir cannot be made, or the adapters do not fit the model.
        TeacherError: the teacher does not score the rows.
    """
    _check_folder(Path(args.output_dir or ""))
    if isinstance(prepared.train, ExampleStream):
        prepared = replace(prepared, train=prepared.train[:_OF_STREAM])
    memory = estimate_memory(
        recipe.model, recipe.adapters, args, tokens=_micro_batch_tokens(prepared, args)
    )
    said = [] if teacher is None else _scored(teacher, prepared)
    _, most = _tokens(prepared, args)
    colours = has_colours(sys.stdout)
    sections = [
        _table(
            "Dry run: no weights are loaded, nothing is trained, nothing is written",
            _settings(recipe, prepared, args, memory, teacher, questions),
        ),
        _table(
            f"Memory of one process, without activations{_sharded(args)}", _memory(memory, args)
        ),
    ]
    if teacher is not None and asked is not None:
        sections.append(_table("Teacher", [*said, *_traffic(teacher, asked, args, most)]))
    sections.append("\n".join(_rows(prepared, args, colours)))
    for section in sections if PartialState().is_main_process else ():
        title, _, rest = section.partition("\n")
        sys.stdout.write(f"{painted(title, 'bold', colours)}\n{rest}\n\n")
    PartialState().wait_for_everyone()  # or the group ends under those who still talk
    PartialState().destroy_process_group()


def _table(title: str, rows: Sequence[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in rows) + 2
    return "\n".join([title, *(f"  {name.ljust(width)}{printable(text)}" for name, text in rows)])


def _check_folder(folder: Path) -> None:
    """Raises `ConfigurationError` where the folder could not be made or written to."""
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise ConfigurationError(
            f"--output_dir {folder}: {nearest} is no folder that can be written to"
        )


def _settings(
    recipe: Recipe,
    prepared: Prepared,
    args: CommonTrainingArguments,
    memory: Memory,
    teacher: Teacher | None,
    questions: int | None,
) -> list[tuple[str, str]]:
    told = [("method", _method(args))]
    if isinstance(args, DistillArguments):
        told.append(("divergence", _divergence(args, prepared.method)))
    trained = "all weights"
    if recipe.adapters.use_peft:
        trained = f"{memory.trainable:,} of LoRA, rank {recipe.adapters.lora_r}"
    told.append((
        "student",
        f"{recipe.model.model_name_or_path}: {memory.parameters:,} parameters, "
        f"{recipe.model.torch_dtype}; trained are {trained}",
    ))  # fmt: skip
    if teacher is not None:
        told += _identity(teacher, prepared)
        ends = compare_ends(prepared.tokenizer, prepared.method.stop_ids, teacher.info)
        told += [] if ends is None else [("end tokens", ends)]
    told += _data(prepared, streaming=recipe.data.streaming)
    told += _template(prepared)
    if questions is not None:
        told.append(("questions", f"{questions:,} for the teacher, whatever --max_steps says"))
    told.append(("updates", _updates(prepared, args, streaming=recipe.data.streaming)))
    told.append(("tokens a step", _tokens(prepared, args)[0]))
    told.append((
        "learning rate",
        f"{args.learning_rate:g}, {args.lr_scheduler_type.value}, "
        f"{args.warmup_steps:g} warm-up steps; {_name(args.optim)}",
    ))  # fmt: skip
    told.append(("output", str(args.output_dir)))
    return told


def _name(choice: str) -> str:
    """Of a flag's value, which transformers turns into an Enum of strings."""
    return str(getattr(choice, "value", choice))


def _method(args: CommonTrainingArguments) -> str:
    name = method_of(args)
    if isinstance(args, DistillArguments):
        name += f" (--lmbda {args.lmbda:g}{', --seq_kd' if args.seq_kd else ''})"
        if args.sft_weight:
            name += f", {args.sft_weight:g} of it cross-entropy"
    return name


def _divergence(args: DistillArguments, method: DistillationConfig) -> str:
    kind = {0.0: "forward KL(teacher||student)", 1.0: "reverse KL(student||teacher)"}
    support = f"{method.top_k} draws" if method.sampled else f"top {method.top_k}"
    if args.student_top_m:
        support += f" and the student's top {args.student_top_m}"
    tail = "" if method.sampled else f", tail: {args.tail}"
    return (
        f"{kind.get(args.beta, 'generalized JSD')} (--beta {args.beta:g}) at temperature "
        f"{args.temperature:g}; {support}{tail}"
    )


def _identity(teacher: Teacher, prepared: Prepared) -> list[tuple[str, str]]:
    info = teacher.info
    who, limits = info.teacher, info.limits
    return [
        ("teacher", f"{who.model}: {who.dtype}, {who.backend} {who.version}, fingerprint "
                    f"{who.fingerprint[:16]}"),
        ("vocabulary", f"agrees: {prepared.vocab_size:,} tokens are shared, of the teacher's "
                       f"{info.vocab_size:,}"),
        ("limits", f"context {info.max_model_len:,}, top-k {limits.max_top_k:,}; a request of "
                   f"{limits.max_sequences:,} sequences, {limits.max_tokens:,} tokens"),
    ]  # fmt: skip


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
    """Return in what mode the first prompt asks, where a chat template made it."""
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
    """Learned tokens of each row that has a completion of its own."""
    samples = [example.sample for example in prepared.train if example.sample is not None]
    return [int(sample.completion_mask.sum()) for sample in samples]


def _steps(prepared: Prepared, args: CommonTrainingArguments) -> tuple[int, int]:
    """Optimizer steps of the run, and of an epoch."""
    order = TrainingOrder(
        len(prepared.train),
        args.per_device_train_batch_size,
        args.gradient_accumulation_steps,
        seed=args.seed,
        world=args.world_size,
        drop_last=args.dataloader_drop_last,
    )
    if args.max_steps > 0:
        return args.max_steps, order.steps_per_epoch
    return math.ceil(args.num_train_epochs * order.steps_per_epoch), order.steps_per_epoch


def _updates(prepared: Prepared, args: CommonTrainingArguments, *, streaming: bool) -> str:
    steps, of_epoch = _steps(prepared, args)
    batch, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
    epoch = "" if streaming else f", {of_epoch:,} an epoch"
    return (
        f"{steps:,}{epoch}; {batch * accumulation * args.world_size:,} rows each: "
        f"{batch} a micro-batch x {accumulation} accumulated x {args.world_size} processes"
    )


def _tokens(prepared: Prepared, args: CommonTrainingArguments) -> tuple[str, float]:
    """Completion tokens that a step learns, in words; and the most of them, in the mean."""
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    rows = min(rows, len(prepared.train))
    method, lengths = prepared.method, _completion_lengths(prepared)
    written = rows * method.max_new_tokens
    if method.seq_kd or method.lmbda == 1:
        return f"at most {written:,} of the {'teacher' if method.lmbda < 1 else 'student'}", written
    given = rows * sum(lengths) / len(lengths)
    if method.lmbda == 0:
        return f"about {given:,.0f} of the dataset", given
    text = f"about {given:,.0f} of the dataset, or at most {written:,} of the student"
    return text, (1 - method.lmbda) * given + method.lmbda * written


def _micro_batch_tokens(prepared: Prepared, args: CommonTrainingArguments) -> int:
    """Completion tokens of a micro-batch, at most."""
    if args.max_tokens_per_batch is not None:
        return args.max_tokens_per_batch
    method, longest = prepared.method, max(_completion_lengths(prepared), default=0)
    if method.seq_kd or method.lmbda > 0:
        longest = max(longest, method.max_new_tokens)
    return args.per_device_train_batch_size * longest


def _memory(memory: Memory, args: CommonTrainingArguments) -> list[tuple[str, str]]:
    optimizer = f"not known of --optim {_name(args.optim)} without a GPU"
    if memory.optimizer is not None:
        optimizer = _size(memory.optimizer)
    told = [
        ("weights", _size(memory.weights)),
        ("gradients", _size(memory.gradients)),
        *([("DDP's buckets", _size(memory.buckets))] if memory.buckets else []),
        ("optimizer", optimizer),
    ]
    if memory.casts:
        precision = "bf16" if args.bf16 else "fp16"
        told.append((f"--{precision} copies", f"up to {_size(memory.casts)}"))
    told.append(("loss", f"up to {_size(memory.loss)}: a chunk of logits, and the gradient of an "
                         "output layer that is trained"))  # fmt: skip
    told.append(("together", _size(memory.total)))
    if isinstance(args, DistillArguments) and args.rollout_engine == "vllm":
        share = f"{args.vllm_gpu_memory_utilization:.0%} of the GPU, beside all this"
        told.append(("vLLM's engine", share))
    return told


def _sharded(args: CommonTrainingArguments) -> str:
    return ", before it is sharded" if uses_fsdp(args) or uses_deepspeed(args) else ""


def _size(count: float) -> str:
    unit = min(3, max(0, int(count).bit_length() - 1) // 10)
    text = f"{count / 1024**unit:,.{0 if unit == 0 else 1}f}"
    return f"{text} {('bytes', 'KiB', 'MiB', 'GiB')[unit]}"


def _scored(teacher: Teacher, prepared: Prepared) -> list[tuple[str, str]]:
    """What the teacher says of the first rows: of their completions, or of bare prompts."""
    method = prepared.method
    samples = [_sample(example) for example in prepared.train[:_ROWS]]
    samples = [sample for sample in samples if len(sample.completion_mask)]
    if not samples:
        return [("scored", "nothing: the prompts have a single token")]
    sequences = [(sample.token_ids, sample.completion_start) for sample in samples]
    scores = teacher.score(sequences, top_k=method.top_k, temperature=method.divergence.temperature)
    items = [ScoredSample(sample, score) for sample, score in zip(samples, scores, strict=True)]
    said = sparse_distribution(items, prepared.vocab_size)
    logs = torch.cat([said.logprobs, said.tail_logprob[:, None]], dim=1).double()  # [N, K + 1]
    entropy = -torch.where(logs > -torch.inf, logs.exp() * logs, 0.0).sum(dim=1).mean()
    of_next = said.logprobs[:, 0].mean()  # the next token is the first of the support
    bare = not any(example.sample for example in prepared.train[:_ROWS])
    what = "bare prompts" if bare else "completions"
    own = ", of prompts, which says nothing of completions" if bare else ", of the rows' own tokens"
    return [
        ("scored", f"{len(samples)} rows, {len(logs):,} tokens of their {what}; the mean of each:"),
        ("entropy", f"{entropy:.3f} nats, of the top-k and the tail as one outcome"),
        ("top-k mass", f"{1 - said.tail_logprob.exp().mean():.4f}"),
        ("cross-entropy", f"{-of_next:.3f} nats{own}"),
    ]


def _traffic(
    teacher: Teacher, asked: TeacherArguments, args: CommonTrainingArguments, tokens: float
) -> list[tuple[str, str]]:
    """Bytes of answers; ``tokens`` is how many completion tokens a step has."""
    assert isinstance(args, DistillArguments)  # no other has a teacher
    received, scored = teacher.take_traffic()
    found = f"{received / scored:,.0f} measured in these short ones" if scored else ""
    if asked.teacher_protocol == "vllm":
        return [("traffic", f"bytes a completion token: {found}")]
    each = token_bytes(asked, args.student_top_m)
    k, dtype = asked.top_k_logprobs, asked.teacher_logprob_dtype
    return [
        ("traffic", f"{each:,} bytes a completion token (k = {k}, {dtype}); {found}"),
        ("", f"up to {_size(each * tokens)} a step"),
    ]


def token_bytes(asked: TeacherArguments, student_top_m: int) -> int:
    """Of the arrays of a row: ids and log-probs, the next token's and the tail's, requested ones.

    What stands around them comes on top, some 250 bytes a sequence.
    """
    size = 2 if asked.teacher_logprob_dtype == "float16" else 4
    return asked.top_k_logprobs * (4 + size) + 4 + 4 + student_top_m * size


def _sample(example: Example) -> Sample:
    """The row's own completion; without one, all of the prompt but its first token."""
    if example.sample is not None:
        return example.sample
    mask = np.ones(len(example.prompt_ids) - 1, dtype=bool)
    return Sample(example.prompt_ids, 1, mask, "dataset")


def _rows(prepared: Prepared, args: CommonTrainingArguments, colours: bool) -> Iterator[str]:
    """The first rows as the student sees them; what is learned of them stands out."""
    method = prepared.method
    marked = "green" if colours else "in [[ ]]"
    given = method.lmbda < 1 and not method.seq_kd
    if given:
        yield f"The first rows; learned is what is {marked}"
    else:
        writer = "teacher" if method.lmbda < 1 else "student"
        yield f"The first prompts; the {writer} writes the completions, the dataset's are not used"
    for example in prepared.train[:_ROWS]:
        sample = example.sample if given else None
        prompt = len(example.prompt_ids) if sample is None else sample.completion_start
        told = f"{prompt:,} tokens of prompt"
        if sample is not None:
            told += f", {int(sample.completion_mask.sum()):,} learned"
            told += ", cut at the limit" if sample.truncated else ""
        yield f"  {example.name}: {told}"
        for line in _rendered(example, sample, prepared, colours).split("\n"):
            yield f"    {line}"


def _rendered(example: Example, sample: Sample | None, prepared: Prepared, colours: bool) -> str:
    if sample is None:
        return painted(_text(prepared, example.prompt_ids), "dim", colours)
    learned = np.concatenate([np.zeros(sample.completion_start, bool), sample.completion_mask])
    changes = np.flatnonzero(learned[1:] != learned[:-1]) + 1
    text = ""
    for start, ids, mask in zip(
        [0, *changes],
        np.split(sample.token_ids, changes),
        np.split(learned, changes),
        strict=True,
    ):
        piece = _text(prepared, ids, sample.token_ids[:start])
        if mask[0]:
            text += painted(piece, "green", True) if colours else f"[[{piece}]]"
        else:
            text += painted(piece, "dim", colours)
    return text


def _text(prepared: Prepared, ids: NDArray[np.uint32], before: Ids = ()) -> str:
    text = printable(completion_text(prepared.tokenizer, before, ids, skip_special_tokens=False))
    left_out = len(text) - _CHARACTERS
    if left_out <= 0:
        return text
    half = _CHARACTERS // 2
    return f"{text[:half]} ... {left_out:,} characters ... {text[-half:]}"

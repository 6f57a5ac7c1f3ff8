"""`sft` and `distill`: from flags to a trained model in a folder."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import PreTrainedTokenizerBase, set_seed

from shared.errors import (
    ConfigurationError,
    RowTooLongError,
    TeacherChangedError,
    TokenizerMismatchError,
)
from shared.identity import tokenizer_identity
from shared.protocol import InfoResponse, TeacherIdentity
from student_trainer.answer_store import AnswerStore
from student_trainer.cached_teacher import CachedTeacher
from student_trainer.checkpoints import writing
from student_trainer.checks import (
    api_key_of,
    check_common,
    check_distill,
    check_generation,
    check_rollouts,
)
from student_trainer.config import (
    COMMANDS,
    AdapterArguments,
    CommonTrainingArguments,
    DataArguments,
    DatasetArguments,
    DistillArguments,
    GenerationArguments,
    ModelArguments,
    TeacherArguments,
    checkpoint_of,
    parse,
    traced_steps,
)
from student_trainer.data.examples import RowTokenizer
from student_trainer.data.order import TrainingOrder
from student_trainer.data.rows import load_rows, named_rows
from student_trainer.data.sample import Example
from student_trainer.data.tokenize import keep_short, tokenize_rows
from student_trainer.dry_run import asked_briefly, dry_run
from student_trainer.evaluation.checkers import missing_fences, parse_checker
from student_trainer.loading import (
    context_length,
    load_config,
    load_stop_ids,
    load_student,
    load_tokenizer,
)
from student_trainer.model_card import model_card
from student_trainer.pipeline import Method, dataset_sample
from student_trainer.questions import count_missing, questions
from student_trainer.rollouts import VllmEngine
from student_trainer.self_check import check_repeats
from student_trainer.signals import first_signal_asks
from student_trainer.teacher import SparseGkdTeacher, Teacher
from student_trainer.trainer import DistillationTrainer
from student_trainer.vllm_teacher import VllmTeacher

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recipe:
    """What `sft` and `distill` are both told, besides the Trainer's own arguments."""

    model: ModelArguments
    adapters: AdapterArguments
    dataset: DatasetArguments
    data: DataArguments
    generation: GenerationArguments

    @property
    def flags(self) -> tuple[Any, ...]:
        return self.model, self.adapters, self.dataset, self.data, self.generation


def sft(argv: Sequence[str]) -> None:
    """Supervised fine-tuning on the dataset's completions."""
    *parts, args = parse(
        argv, *COMMANDS["sft"], prog="student-trainer sft", description=sft.__doc__ or ""
    )
    recipe = Recipe(*parts)
    check_recipe(recipe, args)
    rows = read_rows(recipe)
    prepared = prepare(recipe, rows, args, teacher=None, distill=None, top_k=1)
    if args.dry_run:
        dry_run(recipe, prepared, args)
        return
    _train(recipe, prepared, args, teacher=None, distill=None, flags=(*recipe.flags, args))


def distill(argv: Sequence[str]) -> None:
    """Distillation from a served teacher: Supervised KD, SeqKD, on-policy GKD, or a mixture."""
    *parts, teacher, args = parse(
        argv,
        *COMMANDS["distill"],
        prog="student-trainer distill",
        description=distill.__doc__ or "",
    )
    distilled(Recipe(*parts), teacher, args)


def distilled(
    recipe: Recipe, teacher: TeacherArguments, args: DistillArguments
) -> DistillationTrainer | None:
    """The trainer after its run, or None after a dry one; for `distill` and the Python API."""
    check_distill(args, teacher)
    check_rollouts(args, recipe.adapters)
    check_recipe(recipe, args)
    rows = read_rows(recipe)  # a missing file is told before a teacher is waited for
    if args.dry_run:
        teacher = asked_briefly(teacher)
    alone = args.lmbda == 0 and not args.student_top_m
    with open_teacher(teacher, recipe.model, starts_alone=alone) as client:
        check_request(client.connect(), args, teacher)
        check_one_teacher(client.info.teacher)
        prepared = prepare(
            recipe, rows, args, teacher=client, distill=args, top_k=teacher.top_k_logprobs
        )
        check_repeats(
            client, prepared.train, prepared.method, tolerance=teacher.teacher_repeat_tolerance
        )
        if args.dry_run:
            dry_run(recipe, prepared, args, teacher=client, asked=teacher)
            return None
        flags = (*recipe.flags, teacher, args)
        return _train(recipe, prepared, args, teacher=client, distill=args, flags=flags)


def open_teacher(
    teacher: TeacherArguments, model: ModelArguments, *, starts_alone: bool = False
) -> Teacher:
    """The client that ``--teacher_protocol`` names, not yet connected; behind ``--teacher_cache``.

    Args:
        starts_alone: a cache that knows the teacher does not wait for it.
    """
    assert teacher.teacher_url is not None  # checked with the flags
    if teacher.teacher_protocol == "vllm":
        return VllmTeacher(
            teacher.teacher_url,
            tokenizer=load_tokenizer(model),
            rows=int(load_config(model).get_text_config().vocab_size),
            top_k=teacher.top_k_logprobs,
            timeout=teacher.teacher_timeout,
            accept_change=teacher.accept_teacher_change,
            api_key=api_key_of(teacher),
            unreachable=teacher.teacher_unreachable,
        )
    client = SparseGkdTeacher(
        teacher.teacher_url,
        timeout=teacher.teacher_timeout,
        accept_change=teacher.accept_teacher_change,
        logprob_dtype=teacher.teacher_logprob_dtype,
        api_key=api_key_of(teacher),
        unreachable=teacher.teacher_unreachable,
    )
    if teacher.teacher_cache is None:
        return client
    size = int(teacher.teacher_cache_max_gb * 1e9)
    store = AnswerStore(teacher.teacher_cache, max_bytes=size)
    return CachedTeacher(
        client, store, logprob_dtype=teacher.teacher_logprob_dtype, starts_alone=starts_alone
    )


def check_recipe(recipe: Recipe, args: CommonTrainingArguments) -> None:
    """Raises `ConfigurationError` for what cannot work, before a teacher is waited for."""
    check_common(recipe.model, recipe.adapters, recipe.dataset, recipe.data, args)
    check_generation(recipe.generation)
    if args.n_gpu > 1:
        raise ConfigurationError(
            f"{args.n_gpu} GPUs are visible to one process; start one process a GPU with "
            "`accelerate launch -m student_trainer …`, or set CUDA_VISIBLE_DEVICES to one"
        )
    checkpoint_of(args)


@dataclass(frozen=True)
class Rows:
    """(where, row) pairs to train on, and held-out ones if there are any."""

    train: list[tuple[str, dict[str, Any]]]
    held_out: list[tuple[str, dict[str, Any]]] | None


def read_rows(recipe: Recipe) -> Rows:
    """Raises `DatasetError` for what is missing, empty or malformed."""
    dataset, data = recipe.dataset, recipe.data
    config = dataset.dataset_config
    if dataset.rows is not None:
        train = named_rows(dataset.rows, "dataset")
    else:
        train = load_rows(dataset.dataset_name, config=config, split=dataset.dataset_split)
    if data.eval_rows is not None:
        return Rows(train, named_rows(data.eval_rows, "eval_dataset"))
    if not data.eval_dataset_name:
        return Rows(train, None)
    held_out = load_rows(data.eval_dataset_name, config=config, split=data.eval_dataset_split)
    return Rows(train, held_out)


def _train(
    recipe: Recipe,
    prepared: Prepared,
    args: CommonTrainingArguments,
    *,
    teacher: Teacher | None,
    distill: DistillArguments | None,
    flags: Sequence[Any],
) -> DistillationTrainer:
    checkpoint = checkpoint_of(args)
    set_seed(args.seed)
    method, train, held_out = prepared.method, prepared.train, prepared.held_out
    _make_folder(args)
    student = load_student(
        recipe.model, recipe.adapters, gradient_checkpointing=args.gradient_checkpointing
    )
    longest = longest_rollout(train, held_out, method)
    with open_engine(student, recipe, distill, longest) as engine:
        trainer = DistillationTrainer(
            student,
            args=args,
            method=method,
            beta=0.0 if distill is None else distill.beta,
            teacher=teacher,
            vocab_size=prepared.vocab_size,
            tail="bucket" if distill is None else distill.tail,
            sft_weight=0.0 if distill is None else distill.sft_weight,
            kernel=args.loss_kernel,
            student_top_m=0 if distill is None else distill.student_top_m,
            rollout_temperature=1.0 if distill is None else distill.rollout_temperature,
            generation_batch_size=recipe.generation.generation_batch_size,
            vllm=engine,
            max_tokens_per_batch=args.max_tokens_per_batch,
            packing=args.packing,
            staleness=0 if distill is None else distill.rollout_staleness,
            prefetch_steps=0 if distill is None else distill.teacher_prefetch_steps,
            trace_steps=traced_steps(args),
            card=partial(
                model_card,
                arguments=flags,
                teacher=None if teacher is None else teacher.info.teacher,
                rows=len(train),
            ),
            train_dataset=train,
            eval_dataset=held_out,
            processing_class=prepared.tokenizer,
        )
        if isinstance(teacher, CachedTeacher):
            learned = [train[i] for i in rows_of_run(args, trainer.order)]
            measured = held_out if args.eval_strategy != "no" or args.eval_on_start else []
            teacher.require(*count_missing(teacher, questions(method, learned, measured)))
        result = trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.stopped:
        logger.warning(
            "told to end: saved after step %d of %d; the same command with "
            "--resume_from_checkpoint auto goes on",
            trainer.state.global_step,
            trainer.state.max_steps,
        )
        _end(trainer)
        return trainer
    output = Path(args.output_dir or "")
    # The run is over but for its files: told to end now, it ends with them whole.
    with first_signal_asks(math.inf, lambda: None), writing("the trained model", output):
        trainer.save_model()
        trainer.save_metrics("train", result.metrics)
        trainer.save_state()
        trainer.create_model_card()
    trainer.log_metrics("train", result.metrics)
    if args.push_to_hub:
        trainer.push_to_hub()
    _end(trainer)
    return trainer


def _end(trainer: DistillationTrainer) -> None:
    """Together: a process that ends while the others' group still runs is aborted now and then."""
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


@dataclass(frozen=True)
class Prepared:
    """What `distill` and `precompute` make of rows and flags, before there is a student."""

    tokenizer: PreTrainedTokenizerBase
    vocab_size: int
    method: Method
    train: list[Example]
    held_out: list[Example] | None


def prepare(
    recipe: Recipe,
    rows: Rows,
    args: CommonTrainingArguments,
    *,
    teacher: Teacher | None,
    distill: DistillArguments | None,
    top_k: int,
) -> Prepared:
    """Raises `DatasetError` and `ConfigurationError` for rows and flags that cannot be learned."""
    tokenizer = load_tokenizer(recipe.model)
    config = load_config(recipe.model)
    vocab_size = int(config.get_text_config().vocab_size)
    context = context_length(config)
    if teacher is not None:
        check_vocabulary(tokenizer, vocab_size, teacher.info)
        vocab_size = min(vocab_size, teacher.info.vocab_size)
        context = min(context, teacher.info.max_model_len)
    if distill is not None and distill.student_top_m > vocab_size:
        raise ConfigurationError(
            f"--request_student_top_m {distill.student_top_m} is over the shared "
            f"vocabulary of {vocab_size}"
        )
    stop_ids = load_stop_ids(recipe.model, tokenizer)
    method = _method(args, distill, recipe.generation, top_k, stop_ids)
    train, held_out = make_examples(rows, recipe.data, tokenizer, method, context)
    checkers = [example.checker for example in held_out or [] if example.checker]
    missing_fences(checkers, unsafe=args.unsafe_sandbox)
    batch = args.per_device_train_batch_size * args.world_size
    if args.dataloader_drop_last and len(train) < batch:
        raise ConfigurationError(
            f"--dataloader_drop_last leaves nothing: {len(train)} rows make no batch of {batch}"
        )
    return Prepared(tokenizer, vocab_size, method, train, held_out)


def rows_of_run(args: CommonTrainingArguments, order: TrainingOrder) -> list[int]:
    """Numbers of the rows that this rank learns."""
    steps = args.max_steps
    if steps <= 0:
        steps = math.ceil(args.num_train_epochs * order.steps_per_epoch)
    taken = (order.micro_batches(step) for step in range(min(steps, order.steps_per_epoch)))
    return sorted({row for micro_batches in taken for rows in micro_batches for row in rows})


def longest_rollout(
    train: Sequence[Example], held_out: Sequence[Example] | None, method: Method
) -> int:
    """Tokens of the longest prompt that the student is asked, and a whole completion.

    Of held-out rows those with a checker: others may fill the context.
    """
    asked = [*train, *(example for example in held_out or [] if example.checker is not None)]
    return max(len(example.prompt_ids) for example in asked) + method.max_new_tokens


def open_engine(
    student: Any, recipe: Recipe, distill: DistillArguments | None, max_model_len: int
) -> AbstractContextManager[VllmEngine | None]:
    """What ``--rollout_engine`` asks for beside the student; nothing for transformers."""
    if distill is None or distill.rollout_engine == "transformers":
        return nullcontext()
    dtype = str(next(student.parameters()).dtype).removeprefix("torch.")
    if distill.bf16 or distill.fp16:  # what the student computes in
        dtype = "bfloat16" if distill.bf16 else "float16"
    return VllmEngine(
        student,
        max_model_len=max_model_len,
        dtype=dtype,
        gpu_memory_utilization=distill.vllm_gpu_memory_utilization,
        max_num_seqs=recipe.generation.generation_batch_size,
    )


def check_one_teacher(identity: TeacherIdentity) -> None:
    """Raises `TeacherChangedError`, on every rank, where they reached different teachers."""
    reached = gather_object([identity])
    for rank, other in enumerate(reached):
        if other != reached[0]:
            raise TeacherChangedError(
                f"the processes of this run reached different teachers: process 0 {reached[0]}, "
                f"process {rank} {other}. Serve one model at every --teacher_url"
            )


def check_request(info: InfoResponse, args: DistillArguments, teacher: TeacherArguments) -> None:
    """Raises `ConfigurationError` where the teacher cannot do what the flags ask."""
    if teacher.top_k_logprobs > info.limits.max_top_k:
        raise ConfigurationError(
            f"--top_k_logprobs {teacher.top_k_logprobs} is over the teacher's limit of "
            f"{info.limits.max_top_k}"
        )
    if args.temperature != 1.0 and not info.capabilities.temperature:
        raise ConfigurationError(
            f"--temperature {args.temperature}: the teacher's backend ({info.teacher.backend}) "
            "cannot apply a temperature; use 1.0"
        )
    wanted, most = args.student_top_m, info.limits.max_requested_token_ids
    default = ", the default for --beta 1" if args.request_student_top_m is None else ""
    if wanted and not info.capabilities.requested_token_ids:
        raise ConfigurationError(
            f"--request_student_top_m {wanted}{default}: the teacher's backend "
            f"({info.teacher.backend}) cannot score requested ids; give 0"
        )
    if wanted > most:
        raise ConfigurationError(
            f"--request_student_top_m {wanted} is over the teacher's limit of {most}"
        )
    if args.teacher_support == "sampled" and not info.capabilities.sample_seed:
        raise ConfigurationError(
            f"--teacher_support sampled: the teacher's backend ({info.teacher.backend}) draws no "
            "support; use top_k"
        )
    if args.seq_kd and not info.capabilities.generate:
        raise ConfigurationError("--seq_kd: this teacher does not generate")


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, rows: int, info: InfoResponse) -> None:
    """Refuse a teacher whose token ids mean other tokens; padded vocabularies are no difference.

    Raises:
        TokenizerMismatchError: shows both fingerprints.
    """
    ours, theirs = tokenizer_identity(tokenizer), info.tokenizer
    if ours.fingerprint != theirs.fingerprint:
        raise TokenizerMismatchError(
            f"teacher and student have different vocabularies: the teacher's tokenizer is "
            f"{theirs.fingerprint} ({theirs.vocab_size} tokens), the student's {ours.fingerprint} "
            f"({ours.vocab_size} tokens). Distil within one tokenizer family"
        )
    shared = min(rows, info.vocab_size)
    if len(tokenizer) > shared:
        raise TokenizerMismatchError(
            f"the tokenizer has {len(tokenizer)} tokens, but the output layers have {rows} "
            f"(student) and {info.vocab_size} (teacher) rows: resize the smaller one"
        )
    for name in ("special_token_ids", "chat_template"):
        mine, other = getattr(ours, name), getattr(theirs, name)
        if mine != other:
            logger.warning("%s differs: teacher %r, student %r", name, other, mine)


def make_examples(
    rows: Rows,
    data: DataArguments,
    tokenizer: PreTrainedTokenizerBase,
    method: Method,
    context: int,
) -> tuple[list[Example], list[Example] | None]:
    """Training and held-out examples, checked against what the method needs of each row.

    Raises:
        DatasetError: names the first row that does not do.
    """
    max_length = data.max_length or context
    if max_length > context:
        raise ConfigurationError(
            f"--max_length {max_length} is over the context of student and teacher, {context}"
        )
    remedy = "That is the context of student and teacher; pass --skip_long_rows to leave it out"
    if max_length < context:
        remedy = f"Raise --max_length, up to {context}, or pass --skip_long_rows to leave it out"
    main = PartialState().is_main_process

    def tokenize(rows: list[tuple[str, dict[str, Any]]], what: str) -> list[Example]:
        return tokenize_rows(
            rows,
            RowTokenizer(tokenizer, method.stop_ids, data, max_length),
            skip_long_rows=data.skip_long_rows,
            remedy=remedy,
            description=f"Tokenizing {what}",
            progress=main,
        )

    skip = data.skip_long_rows
    train = keep_short(
        tokenize(rows.train, "training rows"),
        lambda example: _usable(example, method, max_length),
        skip=skip,
        remedy=remedy,
    )
    held_out = None
    if rows.held_out is not None:
        held_out = keep_short(
            tokenize(rows.held_out, "held-out rows"),
            lambda example: _checkable(example, method, max_length),
            skip=skip,
            remedy=remedy,
        )
    if main:
        _tell_losses(rows.train, train, max_length)
        _tell_losses(rows.held_out or [], held_out or [], max_length)
    return train, held_out


def _tell_losses(rows: Sequence[Any], examples: Sequence[Example], max_length: int) -> None:
    left_out = len(rows) - len(examples)
    if left_out:
        logger.warning("%d of %d rows are left out: too long", left_out, len(rows))
    cut = sum(example.sample.truncated for example in examples if example.sample is not None)
    if cut:
        logger.warning("%d of %d completions are cut at %d tokens", cut, len(examples), max_length)


def _usable(example: Example, method: Method, max_length: int) -> Example:
    """The example, when the method can learn from it."""
    if method.lmbda < 1 and not method.seq_kd:
        dataset_sample(example)
    if method.lmbda > 0 or method.seq_kd:
        _check_room(example, method, max_length)
    return example


def _checkable(example: Example, method: Method, max_length: int) -> Example:
    """The held-out example, when its checker, if any, can be used."""
    if example.checker is not None:
        parse_checker(example.checker, example.name)
        _check_room(example, method, max_length)
    return example


def _check_room(example: Example, method: Method, max_length: int) -> None:
    length = len(example.prompt_ids) + method.max_new_tokens
    if length > max_length:
        raise RowTooLongError(
            f"{example.name}: a prompt of {len(example.prompt_ids)} tokens and --max_new_tokens "
            f"{method.max_new_tokens} make {length} tokens; the limit is {max_length}: lower "
            "--max_new_tokens if completions may be shorter"
        )


def _make_folder(args: CommonTrainingArguments) -> None:
    folder = Path(args.output_dir or "")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(f"--output_dir {folder}: {error.strerror or error}") from error


def _method(
    args: CommonTrainingArguments,
    distill: DistillArguments | None,
    generation: GenerationArguments,
    top_k: int,
    stop_ids: list[int],
) -> Method:
    return Method(
        lmbda=0.0 if distill is None else distill.lmbda,
        seq_kd=False if distill is None else distill.seq_kd,
        seq_kd_temperature=0.0 if distill is None else distill.seq_kd_temperature,
        temperature=1.0 if distill is None else distill.temperature,
        top_k=top_k,
        max_new_tokens=generation.max_new_tokens,
        seed=args.seed,
        stop_ids=tuple(stop_ids),
        sampled=distill is not None and distill.teacher_support == "sampled",
    )

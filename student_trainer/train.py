"""`sft` and `distill`: from flags to a trained model in a folder."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
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
from shared.identity import parting_text, tokenizer_identity
from shared.protocol import InfoResponse, TeacherIdentity, TokenizerIdentity
from shared.text import check_round_trip, encoded
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
    TemplateArguments,
    checkpoint_of,
    parse,
    traced_steps,
)
from student_trainer.data.check import check_token_ids, texts_of
from student_trainer.data.conversation import PlainText, check_columns, read_row
from student_trainer.data.end_tokens import compare_ends
from student_trainer.data.examples import RowTokenizer, row_of
from student_trainer.data.mixture import Mixture, mix
from student_trainer.data.order import TrainingOrder
from student_trainer.data.rows import (
    Row,
    is_hub_id,
    iterate_named,
    iterate_rows,
    load_rows,
    named_rows,
)
from student_trainer.data.sample import Example
from student_trainer.data.stream import ExampleStream, RowStream
from student_trainer.data.template import NOTES, ChatTemplate, TemplateOptions
from student_trainer.data.template_date import keep_date, read_date
from student_trainer.data.tokenize import keep_short, tokenize_rows
from student_trainer.dry_run import asked_briefly, dry_run
from student_trainer.evaluation.checkers import missing_fences, parse_checker
from student_trainer.loading import (
    context_length,
    load_config,
    load_stop_ids,
    load_student,
    load_text_end,
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
from student_trainer.training.cut_completions import CutCompletions
from student_trainer.training.inputs import check_resumed, keep_inputs, training_inputs
from student_trainer.training.text_end import KeepEndTokens
from student_trainer.vllm_teacher import VllmTeacher

logger = logging.getLogger(__name__)

_LOOK = 100  # rows of a stream's datasets that are looked at before the run
_BUFFER = 10_000
_TRIED_ROWS = 16  # whose texts are encoded and decoded before a model loads


@dataclass(frozen=True)
class Recipe:
    """What `sft` and `distill` are both told, besides the Trainer's own arguments."""

    model: ModelArguments
    adapters: AdapterArguments
    dataset: DatasetArguments
    data: DataArguments
    generation: GenerationArguments
    template: TemplateArguments = field(default_factory=TemplateArguments)

    @property
    def flags(self) -> tuple[Any, ...]:
        return (
            self.model, self.adapters, self.dataset, self.data, self.generation, self.template,
        )  # fmt: skip


def sft(argv: Sequence[str]) -> None:
    """Supervised fine-tuning on the dataset's completions."""
    *parts, args = parse(
        argv, *COMMANDS["sft"], prog="student-trainer sft", description=sft.__doc__ or ""
    )
    recipe = Recipe(*parts)
    check_recipe(recipe, args)
    rows = read_rows(recipe, args.seed)
    prepared = prepare(recipe, rows, args)
    if args.dry_run:
        dry_run(recipe, prepared, args)
        return
    keep_template_date(prepared, date_folders(args, None))
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
    rows = read_rows(recipe, args.seed)  # a missing file is told before a teacher is waited for
    if args.dry_run:
        teacher = asked_briefly(teacher)
    # What a stream will ask is not known, so a cache cannot tell that it holds all of it.
    alone = args.lmbda == 0 and not args.student_top_m and not recipe.data.streaming
    with open_teacher(teacher, recipe.model, starts_alone=alone) as client:
        check_request(client.connect(), args, teacher)
        check_one_teacher(client.info.teacher)
        prepared = prepare(recipe, rows, args, distill=args, teacher=client, asked=teacher)
        check_repeats(
            client, prepared.train, prepared.method, tolerance=teacher.teacher_repeat_tolerance
        )
        if args.dry_run:
            dry_run(recipe, prepared, args, teacher=client, asked=teacher)
            return None
        keep_template_date(prepared, date_folders(args, teacher.teacher_cache))
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
    """(where, row) pairs to train on, all or a stream of them, and held-out ones, if any."""

    train: list[Row] | RowStream
    held_out: list[Row] | None
    mixture: Mixture | None = None  # of several datasets in memory


def read_rows(recipe: Recipe, seed: int) -> Rows:
    """Return the rows that the flags name; of a stream, its first rows are looked at.

    Raises:
        DatasetError: what is missing, empty or malformed.
        ConfigurationError: a flag has no effect on these rows.
    """
    dataset, data = recipe.dataset, recipe.data
    _check_hub_flags(dataset, data)
    mixture = None
    train: list[Row] | RowStream
    if data.streaming:
        train = _stream(dataset, data, seed)
        check_columns(train.head(_LOOK), data)
        if train.weights is not None:
            for name, weight in zip(train.names, train.weights, strict=True):
                share = weight / sum(train.weights)
                logger.warning("%s: %.1f%% of the stream's rows", name, 100 * share)
    elif dataset.rows is not None:
        train = named_rows(dataset.rows, "dataset")
    else:
        parts = [
            load_rows(name, config=dataset.dataset_config, split=dataset.dataset_split)
            for name in dataset.dataset_name
        ]
        train = [row for part in parts for row in part]
        if len(parts) > 1:
            sizes = [len(part) for part in parts]
            mixture = Mixture(dataset.dataset_name, sizes, data.dataset_weights, seed)
    if not isinstance(train, RowStream):
        check_columns(train, data)
    if data.eval_rows is not None:
        return Rows(train, named_rows(data.eval_rows, "eval_dataset"), mixture)
    if not data.eval_dataset_name:
        return Rows(train, None, mixture)
    held_out = load_rows(
        data.eval_dataset_name, config=dataset.dataset_config, split=data.eval_dataset_split
    )
    return Rows(train, held_out, mixture)


def _check_hub_flags(dataset: DatasetArguments, data: DataArguments) -> None:
    names = [] if dataset.rows is not None else list(dataset.dataset_name)
    if data.eval_rows is None and data.eval_dataset_name:
        names.append(data.eval_dataset_name)
    if dataset.dataset_config is not None and not any(map(is_hub_id, names)):
        raise ConfigurationError(
            f"--dataset_config {dataset.dataset_config} has no effect on files; it is for a "
            "dataset of the Hub"
        )


def _stream(dataset: DatasetArguments, data: DataArguments, seed: int) -> RowStream:
    rows = dataset.rows
    if rows is not None:
        if iter(rows) is rows:
            raise ConfigurationError(
                "streaming: rows that can be read once only cannot be read again to resume; give "
                "a list, a datasets.IterableDataset, or any object with __iter__"
            )
        sources = [partial(iterate_named, rows, "dataset")]
    else:
        sources = [
            partial(
                iterate_rows,
                name,
                config=dataset.dataset_config,
                split=dataset.dataset_split,
                streaming=True,
            )
            for name in dataset.dataset_name
        ]
    size = data.shuffle_buffer_size or _BUFFER
    return RowStream(dataset.dataset_name, sources, data.dataset_weights, seed, size)


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
    inputs = training_inputs(
        flags,
        None if isinstance(train, ExampleStream) else train,
        prepared.template,
        rows_a_step=args.per_device_train_batch_size
        * args.gradient_accumulation_steps
        * args.world_size,
        teacher=None if teacher is None else teacher.info.teacher,
    )
    if checkpoint is not None:
        check_resumed(Path(checkpoint), inputs)
    _make_folder(args)
    if args.should_save:
        with writing("what it is trained with", Path(args.output_dir or "")):
            keep_inputs(inputs, Path(args.output_dir or ""))
    student = load_student(
        recipe.model, recipe.adapters, gradient_checkpointing=args.gradient_checkpointing
    )
    longest = prepared.max_length
    if not isinstance(train, ExampleStream):
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
            longest=prepared.max_length,
            staleness=0 if distill is None else distill.rollout_staleness,
            prefetch_steps=0 if distill is None else distill.teacher_prefetch_steps,
            trace_steps=traced_steps(args),
            inputs=inputs,
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
        if method.lmbda > 0 or method.seq_kd:
            trainer.add_callback(CutCompletions(method.max_new_tokens))
        if prepared.keep_end_tokens:
            trainer.add_callback(KeepEndTokens(student))
        if isinstance(teacher, CachedTeacher) and isinstance(trainer.order, TrainingOrder):
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
    train: list[Example] | ExampleStream
    held_out: list[Example] | None
    template: ChatTemplate
    max_length: int
    keep_end_tokens: bool  # the model's own, which are not the tokenizer's


def prepare(
    recipe: Recipe,
    rows: Rows,
    args: CommonTrainingArguments,
    *,
    distill: DistillArguments | None = None,
    teacher: Teacher | None = None,
    asked: TeacherArguments | None = None,
) -> Prepared:
    """Return what a run learns from, as its flags say.

    Args:
        distill, teacher, asked: the flags of the method, the connected teacher and the flags of
            the teacher; None for SFT.

    Raises:
        DatasetError, ConfigurationError: rows or flags that cannot be learned.
    """
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
    if teacher is not None and PartialState().is_main_process:
        told = compare_ends(tokenizer, stop_ids, teacher.info)
        if told is not None:
            logger.warning("%s", told)
    method = _method(
        args, distill, recipe.generation, 1 if asked is None else asked.top_k_logprobs, stop_ids
    )
    folders = date_folders(args, None if asked is None else asked.teacher_cache)
    today = read_date(recipe.template.chat_template_date, folders)
    template = TemplateOptions(recipe.template.kwargs, gather_object([today])[0])
    text_end = load_text_end(recipe.model, tokenizer)
    row_tokenizer = RowTokenizer(
        tokenizer,
        method.stop_ids,
        recipe.data,
        max_length_of(recipe.data, context),
        template,
        one_sequence=method.lmbda == 0 and not method.seq_kd,
        text_end=text_end,
    )
    if recipe.template.chat_template_date and not row_tokenizer.chat.prints_date:
        raise ConfigurationError(
            f"--chat_template_date {recipe.template.chat_template_date} has no effect: "
            f"{row_tokenizer.chat.name} prints no date. Drop it"
        )
    train, held_out = make_examples(rows, row_tokenizer, method, context, args, vocab_size)
    checkers = [example.checker for example in held_out or [] if example.checker]
    missing_fences(checkers, unsafe=args.unsafe_sandbox)
    batch = args.per_device_train_batch_size * args.world_size
    if args.dataloader_drop_last and len(train) < batch:
        raise ConfigurationError(
            f"--dataloader_drop_last leaves nothing: {len(train)} rows make no batch of {batch}"
        )
    return Prepared(
        tokenizer,
        vocab_size,
        method,
        train,
        held_out,
        row_tokenizer.chat,
        row_tokenizer.max_length,
        text_end is not None and _are_plain_text(rows.train, recipe.data),
    )


def _are_plain_text(rows: list[Row] | RowStream, data: DataArguments) -> bool:
    """Return whether no row is a conversation; of a stream, its first rows tell."""
    some = rows.head(_LOOK) if isinstance(rows, RowStream) else rows
    return all(isinstance(read_row(where, row, data), PlainText) for where, row in some)


def date_folders(args: CommonTrainingArguments, teacher_cache: str | None) -> list[Path]:
    """Return where the date of the chat template is kept: with what depends on it."""
    return [Path(folder) for folder in (args.output_dir, teacher_cache) if folder]


def keep_template_date(prepared: Prepared, folders: Sequence[Path]) -> None:
    """Keep the date that the chat template prints, if it prints one, in each folder."""
    if prepared.template.prints_date and PartialState().is_main_process:
        keep_date(prepared.template.options.today, folders)


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
    """Refuse a teacher whose token ids mean other tokens, or that cuts text otherwise.

    Padded vocabularies are no difference. Tokens without a row in either output layer are a
    warning: only those that the data holds matter, and `make_examples` refuses them.

    Raises:
        TokenizerMismatchError: shows both fingerprints, or the text that is cut otherwise.
    """
    ours, theirs = tokenizer_identity(tokenizer), info.tokenizer
    if ours.fingerprint != theirs.fingerprint:
        raise TokenizerMismatchError(
            f"teacher and student have different vocabularies: the teacher's tokenizer is "
            f"{theirs.fingerprint} ({theirs.vocab_size} tokens), the student's {ours.fingerprint} "
            f"({ours.vocab_size} tokens). Distil within one tokenizer family"
        )
    _check_encoding(tokenizer, ours, theirs)
    shared = min(rows, info.vocab_size)
    beyond = {i: token for token, i in tokenizer.get_vocab().items() if i >= shared}
    if beyond:
        logger.warning(
            "%d of the tokenizer's tokens have no row in the output layers of %d (student) and %d "
            "(teacher) rows, %r (id %d) the first: rows of the data that hold one are refused",
            len(beyond), rows, info.vocab_size, beyond[min(beyond)], min(beyond),
        )  # fmt: skip
    for name in ("special_token_ids", "chat_template"):
        mine, other = getattr(ours, name), getattr(theirs, name)
        if mine != other:
            logger.warning("%s differs: teacher %r, student %r", name, other, mine)


def _check_encoding(
    tokenizer: PreTrainedTokenizerBase, ours: TokenizerIdentity, theirs: TokenizerIdentity
) -> None:
    if ours.encoding is None or theirs.encoding is None:
        logger.warning(
            "the teacher's server is older than this trainer and does not say how its tokenizer "
            "cuts text; that of the student may cut it otherwise"
        )
        return
    try:
        text = parting_text(ours.encoding, theirs.encoding)
    except ValueError as error:
        logger.warning("how teacher and student cut text cannot be compared: %s", error)
        return
    if text is not None:
        tokens = tokenizer.convert_ids_to_tokens(encoded(tokenizer, text))
        raise TokenizerMismatchError(
            f"teacher and student have one vocabulary but cut text otherwise: of {text!r} the "
            f"student makes {len(tokens)} tokens, {tokens[:8]} first, and the teacher others. Give "
            "both the same tokenizer.json, and restart the teacher with this version"
        )


def make_examples(
    rows: Rows,
    row_tokenizer: RowTokenizer,
    method: Method,
    context: int,
    args: CommonTrainingArguments,
    vocab_size: int,
) -> tuple[list[Example] | ExampleStream, list[Example] | None]:
    """Training and held-out examples, checked against what the method needs of each row.

    Args:
        context: longest sequence in tokens.
        vocab_size: ids from here on have no row in an output layer.

    Raises:
        DatasetError: names the first row that does not do.
    """
    max_length = row_tokenizer.max_length
    remedy = "That is the context of student and teacher; pass --skip_long_rows to leave it out"
    if max_length < context:
        remedy = f"Raise --max_length, up to {context}, or pass --skip_long_rows to leave it out"
    main = PartialState().is_main_process
    skip = row_tokenizer.options.skip_long_rows

    tokenizer, options = row_tokenizer.tokenizer, row_tokenizer.options

    def tokenize(
        rows: Sequence[Row], what: str, check: Callable[[Example, Method, int], Example]
    ) -> list[Example]:
        check_round_trip(tokenizer, texts_of(rows[:_TRIED_ROWS], options))
        examples = tokenize_rows(
            rows,
            row_tokenizer,
            skip_long_rows=skip,
            remedy=remedy,
            description=f"Tokenizing {what}",
            progress=main,
            num_proc=row_tokenizer.options.dataset_num_proc,
        )
        checked = keep_short(
            examples, lambda example: check(example, method, max_length), skip=skip, remedy=remedy
        )
        check_token_ids(checked, tokenizer, vocab_size)
        if main:
            _tell_losses(rows, checked, max_length)
        return checked

    train: list[Example] | ExampleStream
    if isinstance(rows.train, RowStream):

        def make(number: int, where: str, row: dict[str, Any]) -> list[Example]:
            try:
                if number < _TRIED_ROWS:
                    check_round_trip(tokenizer, texts_of([(where, row)], options))
                examples = row_tokenizer(number, where, row)
                check_token_ids(examples, tokenizer, vocab_size)
                return [_usable(example, method, max_length) for example in examples]
            except RowTooLongError as error:
                raise RowTooLongError(str(error) if skip else f"{error}. {remedy}") from error

        train = ExampleStream(
            rows.train,
            make,
            length=args.max_steps
            * args.gradient_accumulation_steps
            * args.per_device_train_batch_size
            * args.world_size,
            skip=skip,
            rank=args.process_index,
            world=args.world_size,
        )
        _ = train[0]  # what is wrong with all rows is told now
    else:
        train = tokenize(rows.train, "training rows", _usable)
        if rows.mixture is not None:
            train, told = mix(train, rows.mixture)
            for line in told if main else ():
                logger.warning("%s", line)
    held_out = None
    if rows.held_out is not None:
        held_out = tokenize(rows.held_out, "held-out rows", _checkable)
    return train, held_out


def max_length_of(data: DataArguments, context: int) -> int:
    """Return the longest prompt and completion, in tokens.

    Raises:
        ConfigurationError: it is over the ``context`` of student and teacher.
    """
    if data.max_length is not None and data.max_length > context:
        raise ConfigurationError(
            f"--max_length {data.max_length} is over the context of student and teacher, {context}"
        )
    return data.max_length or context


def _tell_losses(rows: Sequence[Any], examples: Sequence[Example], max_length: int) -> None:
    left_out = len(rows) - len({row_of(example) for example in examples})
    if left_out:
        logger.warning("%d of %d rows are left out: too long", left_out, len(rows))
    cut = sum(example.sample.truncated for example in examples if example.sample is not None)
    if cut:
        logger.warning("%d of %d completions are cut at %d tokens", cut, len(examples), max_length)
    for note, told in NOTES.items():
        count = sum(note in example.notes for example in examples)
        if count:
            logger.warning("%d of %d completions %s", count, len(examples), told)


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

"""The recipe of `sft` and `distill`: from flags to a trained model in a folder."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import PreTrainedTokenizerBase, set_seed

from shared.errors import ConfigurationError
from student_trainer.config.arguments import (
    DataArguments,
    DivergenceFlags,
    GenerationArguments,
    Recipe,
    TeacherArguments,
    divergence_flags_of,
    traced_steps,
)
from student_trainer.config.checks.rollouts import rollout_addresses, rollout_key_of
from student_trainer.config.training_arguments import (
    CommonTrainingArguments,
    checkpoint_of,
)
from student_trainer.data.conversation import PlainText, read_row
from student_trainer.data.examples import RowTokenizer
from student_trainer.data.order import TrainingOrder
from student_trainer.data.rows import (
    Row,
)
from student_trainer.data.sample import Example
from student_trainer.data.sources import ROWS_CHECKED, Rows
from student_trainer.data.stream import ExampleStream, RowStream
from student_trainer.data.template import ChatTemplate, TemplateOptions
from student_trainer.data.template_date import keep_date, read_date
from student_trainer.evaluation.checkers import missing_fences
from student_trainer.losses import Divergence
from student_trainer.model.load import (
    context_length,
    load_config,
    load_stop_ids,
    load_student,
    load_text_end,
    load_tokenizer,
)
from student_trainer.pipeline.method import DistillationConfig
from student_trainer.pipeline.planned_requests import planned_requests, require_answers
from student_trainer.rollouts import RolloutServers, ServerOptions, TokenFilter, VllmEngine
from student_trainer.runtime.signals import stop_event
from student_trainer.runtime.threads import wait_for_gloo
from student_trainer.teacher.named import Teachers
from student_trainer.training.checkpoints import remove_earlier_run, writing
from student_trainer.training.counting import rows_of, rows_of_run, tokens_in_flight_of
from student_trainer.training.cut_completions import CutCompletions
from student_trainer.training.disjoint_student import DisjointStudent
from student_trainer.training.examples import make_examples
from student_trainer.training.inputs import check_resumed, keep_inputs, training_inputs
from student_trainer.training.live_log import LiveLog
from student_trainer.training.model_card import model_card
from student_trainer.training.plan import TrainingPlan
from student_trainer.training.small_mass import SmallMass
from student_trainer.training.teachers import compare, view_of
from student_trainer.training.text_end import KeepEndTokens
from student_trainer.training.trainer import DistillationTrainer

logger = logging.getLogger(__name__)


def run(
    recipe: Recipe,
    prepared: Prepared,
    args: CommonTrainingArguments,
    *,
    teachers: Teachers | None,
    flags: Sequence[Any],
    given: Sequence[Any],
) -> DistillationTrainer:
    """Train, and write the model with all that belongs to it; return the trainer after its run.

    Args:
        teachers: connected; None for SFT.
        flags: the dataclasses of all flags, the Trainer's last.
        given: the same before `settle` and the Trainer filled in what was left open.

    Raises:
        ConfigurationError: the checkpoint was trained with something else.
        CheckpointError: the disk takes no more.
        TeacherError: the teacher is lost, or answered what cannot be right.
        NonFiniteError: a loss or a gradient was NaN or infinite.
    """
    checkpoint = checkpoint_of(args)
    set_seed(args.seed)
    method, train, held_out = prepared.method, prepared.train, prepared.held_out
    identities = {} if teachers is None else teachers.identities
    rows = rows_of(train, args)
    inputs = training_inputs(
        flags,
        None if isinstance(train, ExampleStream) else train,
        prepared.template,
        rows_a_step=rows.each_step,
        teachers=identities,
        teacher_template=prepared.teacher_template,
    )
    if checkpoint is not None:
        check_resumed(Path(checkpoint), inputs)
    _make_folder(args)
    if args.should_save:
        with writing("what it is trained with", Path(args.output_dir or "")):
            keep_inputs(inputs, Path(args.output_dir or ""))
    dtype = str(recipe.model.torch_dtype)
    card = partial(model_card, arguments=given, teachers=identities, rows=rows, dtype=dtype)
    plan = replace(plan_of(recipe, prepared, args), inputs=inputs, card=card)
    student = load_student(
        recipe.model, recipe.adapters, gradient_checkpointing=args.gradient_checkpointing
    )
    if args.overwrite_output_dir and checkpoint is None and args.should_save:
        remove_earlier_run(Path(args.output_dir or ""))
    longest = longest_rollout(train, held_out, method, prepared.max_length)
    with open_engine(student, recipe, args, longest) as engine:
        trainer = DistillationTrainer(
            student,
            plan,
            teacher=teachers,
            engine=engine,
            args=args,
            train_dataset=train,
            eval_dataset=held_out,
            processing_class=prepared.tokenizer,
        )
        if method.lmbda > 0 or method.seq_kd:
            trainer.add_callback(CutCompletions(method.max_new_tokens))
        if teachers is not None:
            trainer.add_callback(DisjointStudent(method.divergence.beta))
            if not (method.sampled or plan.student_top_m):  # there a larger k is no remedy
                trainer.add_callback(SmallMass())
        live_log = LiveLog(Path(args.output_dir or ""))
        trainer.add_callback(live_log)
        if prepared.keep_end_tokens:
            trainer.add_callback(KeepEndTokens(student))
        if teachers is not None and isinstance(trainer.rows.order, TrainingOrder):
            learned = [train[i] for i in rows_of_run(args, trainer.rows.order)]
            measured = held_out if args.eval_strategy != "no" or args.eval_on_start else []
            planned = planned_requests(teachers.all_names, method, learned, measured)
            require_answers(teachers, planned)
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
    with stop_event(math.inf, lambda: None), writing("the trained model", output):
        trainer.save_model()
        trainer.save_metrics("train", result.metrics)
        trainer.save_state()
        if args.should_save:
            live_log.remove()
        trainer.create_model_card()
    if args.push_to_hub:
        trainer.push_to_hub()
    _end(trainer)
    return trainer


def plan_of(recipe: Recipe, prepared: Prepared, args: CommonTrainingArguments) -> TrainingPlan:
    """Make the plan of a run from its flags; card and inputs are added later."""
    flags = divergence_flags_of(args)
    return TrainingPlan(
        method=prepared.method,
        vocab_size=prepared.vocab_size,
        sft_weight=flags.sft_weight,
        kernel=args.loss_kernel,
        student_top_m=flags.student_top_m,
        rollout_temperature=flags.rollout_temperature,
        token_filter=token_filter_of(flags),
        num_generations=flags.num_generations,
        generation_batch_size=recipe.generation.generation_batch_size,
        max_tokens_per_batch=args.max_tokens_per_batch,
        packing=args.packing,
        longest=prepared.max_length,
        staleness=flags.rollout_staleness,
        prefetch_steps=flags.teacher_prefetch_steps,
        trace_steps=traced_steps(args),
    )


def _end(trainer: DistillationTrainer) -> None:
    """End all ranks together, as one that ends while the group still runs may be aborted."""
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()
    wait_for_gloo()


@dataclass(frozen=True)
class Prepared:
    """The rows and flags as a run needs them, before there is a student."""

    tokenizer: PreTrainedTokenizerBase
    vocab_size: int
    method: DistillationConfig
    train: list[Example] | ExampleStream
    held_out: list[Example] | None
    template: ChatTemplate
    max_length: int
    keep_end_tokens: bool  # the model's own, which are not the tokenizer's
    teacher_template: str | None  # source of --teacher_prompt_template


def prepare(
    recipe: Recipe,
    rows: Rows,
    args: CommonTrainingArguments,
    *,
    teachers: Teachers | None = None,
    teacher_flags: TeacherArguments | None = None,
) -> Prepared:
    """Return what a run learns from, as its flags say.

    Args:
        teachers: connected; None for SFT, and before they are waited for (see `fit_to_teacher`).
        teacher_flags: their flags; None for SFT.

    Raises:
        DatasetError, ConfigurationError: rows or flags that cannot be learned.
    """
    tokenizer = load_tokenizer(recipe.model)
    config = load_config(recipe.model)
    vocab_size = int(config.get_text_config().vocab_size)
    context = context_length(config)
    stop_ids = load_stop_ids(recipe.model, tokenizer)
    if teachers is not None:
        for info in teachers.infos:
            compare(tokenizer, vocab_size, stop_ids, info)
        vocab_size = min(vocab_size, teachers.vocab_size)
        context = min(context, teachers.max_model_len)
    student_top_m = divergence_flags_of(args).student_top_m
    if student_top_m > vocab_size:
        raise ConfigurationError(
            f"--request_student_top_m {student_top_m} is over the shared vocabulary of {vocab_size}"
        )
    method = _method(
        args,
        recipe.generation,
        1 if teacher_flags is None else teacher_flags.top_k_logprobs,
        stop_ids,
    )
    folders = date_folders(args, None if teacher_flags is None else teacher_flags.teacher_cache)
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
        view=None if teacher_flags is None else view_of(teacher_flags),
    )
    if recipe.template.chat_template_date and not row_tokenizer.chat.prints_date:
        raise ConfigurationError(
            f"--chat_template_date {recipe.template.chat_template_date} has no effect: "
            f"{row_tokenizer.chat.name} prints no date. Drop it"
        )
    train, held_out = make_examples(rows, row_tokenizer, method, context, args, vocab_size)
    tokens_in_flight_of(args, longest_rollout(train, held_out, method, row_tokenizer.max_length))
    checkers = [example.checker for example in held_out or [] if example.checker]
    missing_fences(checkers, unsafe=args.unsafe_sandbox)
    batch = args.per_device_train_batch_size * args.world_size
    completions = len(train) * divergence_flags_of(args).num_generations
    if args.dataloader_drop_last and completions < batch:
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
        None if row_tokenizer.view is None else row_tokenizer.view.template,
    )


def fit_to_teacher(
    prepared: Prepared,
    recipe: Recipe,
    rows: Rows,
    args: CommonTrainingArguments,
    *,
    teachers: Teachers,
    teacher_flags: TeacherArguments,
) -> Prepared:
    """Return what `prepare` made without the teacher as it would be with it.

    Rows are tokenized again only if the teacher's context or vocabulary is the smaller one.

    Raises:
        DatasetError, ConfigurationError, TokenizerMismatchError: as `prepare`.
    """
    longer = teachers.max_model_len < prepared.max_length
    if longer or teachers.vocab_size < prepared.vocab_size:
        return prepare(recipe, rows, args, teachers=teachers, teacher_flags=teacher_flags)
    for info in teachers.infos:
        compare(prepared.tokenizer, prepared.vocab_size, list(prepared.method.stop_ids), info)
    return prepared


def _are_plain_text(rows: list[Row] | RowStream, data: DataArguments) -> bool:
    """Return whether no row is a conversation; of a stream, its first rows tell."""
    some = rows.head(ROWS_CHECKED) if isinstance(rows, RowStream) else rows
    return all(isinstance(read_row(where, row, data), PlainText) for where, row in some)


def date_folders(args: CommonTrainingArguments, teacher_cache: str | None) -> list[Path]:
    """Return where the date of the chat template is kept: with what depends on it."""
    return [Path(folder) for folder in (args.output_dir, teacher_cache) if folder]


def keep_template_date(prepared: Prepared, folders: Sequence[Path]) -> None:
    """Keep the date that the chat template prints, if it prints one, in each folder."""
    if prepared.template.prints_date and PartialState().is_main_process:
        keep_date(prepared.template.options.today, folders)


def token_filter_of(flags: DivergenceFlags) -> TokenFilter:
    """Return the tokens that the student's rollouts are drawn from."""
    return TokenFilter(flags.rollout_top_p, flags.rollout_top_k, flags.rollout_min_p)


def longest_rollout(
    train: Sequence[Example],
    held_out: Sequence[Example] | None,
    method: DistillationConfig,
    max_length: int,
) -> int:
    """Return the tokens of the longest prompt that the student completes, and of a completion.

    Held-out rows count if they have a checker; others are not completed, and may fill the context.
    The rows of a stream are not known, and may have ``max_length``.
    """
    if isinstance(train, ExampleStream):
        return max_length
    completed = [*train, *(example for example in held_out or [] if example.checker is not None)]
    return max(len(example.prompt_ids) for example in completed) + method.max_new_tokens


def open_engine(
    student: Any, recipe: Recipe, args: CommonTrainingArguments, max_model_len: int
) -> AbstractContextManager[VllmEngine | RolloutServers | None]:
    """Open what writes the student's completions in its place, if anything does."""
    flags = divergence_flags_of(args)
    if flags.rollout_engine == "transformers" and not flags.rollout_url:
        return nullcontext()
    dtype = str(next(student.parameters()).dtype).removeprefix("torch.")
    if args.bf16 or args.fp16:  # what the student computes in
        dtype = "bfloat16" if args.bf16 else "float16"
    if flags.rollout_url:
        on_gpu = args.device.type == "cuda"
        options = ServerOptions(
            rollout_addresses(flags),
            flags.rollout_transfer or ("nccl" if on_gpu else "gloo"),
            seconds=flags.rollout_timeout,
            api_key=rollout_key_of(flags),
            max_tokens_in_flight=tokens_in_flight_of(args, max_model_len),
        )
        return RolloutServers(student, options, dtype=dtype, longest=max_model_len)
    return VllmEngine(
        student,
        max_model_len=max_model_len,
        dtype=dtype,
        gpu_memory_utilization=flags.vllm_gpu_memory_utilization,
        tensor_parallel_size=flags.vllm_tensor_parallel_size,
        sleeps=flags.vllm_enable_sleep_mode,
        max_num_seqs=recipe.generation.generation_batch_size,
    )


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


def _make_folder(args: CommonTrainingArguments) -> None:
    folder = Path(args.output_dir or "")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(f"--output_dir {folder}: {error.strerror or error}") from error


def divergence_from_flags(flags: DivergenceFlags) -> Divergence:
    """Return the `Divergence` that --beta, --temperature and --tail make.

    Each flag has the name of its field, so a new field of the divergence is read here already.
    """
    return Divergence(**{field.name: getattr(flags, field.name) for field in fields(Divergence)})


def _method(
    args: CommonTrainingArguments, generation: GenerationArguments, top_k: int, stop_ids: list[int]
) -> DistillationConfig:
    flags = divergence_flags_of(args)
    return DistillationConfig(
        lmbda=flags.lmbda,
        seq_kd=flags.seq_kd,
        seq_kd_temperature=flags.seq_kd_temperature,
        divergence=divergence_from_flags(flags),
        top_k=top_k,
        max_new_tokens=generation.max_new_tokens,
        seed=args.seed,
        stop_ids=tuple(stop_ids),
        sampled=flags.teacher_support == "sampled",
    )

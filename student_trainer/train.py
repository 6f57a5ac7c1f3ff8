"""`sft` and `distill`: from flags to a trained model in a folder."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from accelerate import PartialState
from transformers import PreTrainedTokenizerBase, set_seed

from shared.errors import ConfigurationError, DatasetError, TokenizerMismatchError
from shared.identity import tokenizer_identity
from shared.protocol import InfoResponse
from student_trainer.config import (
    CommonTrainingArguments,
    DataArguments,
    DistillArguments,
    GenerationArguments,
    ModelArguments,
    SFTArguments,
    TeacherArguments,
    check_common,
    check_distill,
    check_generation,
    parse,
)
from student_trainer.data import Example, load_rows, tokenize_rows
from student_trainer.evaluation.checkers import parse_checker
from student_trainer.pipeline import Method, dataset_sample
from student_trainer.student import (
    context_length,
    load_config,
    load_stop_ids,
    load_student,
    load_tokenizer,
)
from student_trainer.teacher import TeacherClient
from student_trainer.trainer import DistillationTrainer

logger = logging.getLogger(__name__)


def sft(argv: Sequence[str]) -> None:
    """Supervised fine-tuning on the dataset's completions."""
    model, data, generation, args = parse(
        argv,
        ModelArguments,
        DataArguments,
        GenerationArguments,
        SFTArguments,
        prog="student-trainer sft",
        description=sft.__doc__ or "",
    )
    check_common(model, data, args)
    check_generation(generation)
    _train(model, data, generation, args, teacher=None, distill=None, top_k=1)


def distill(argv: Sequence[str]) -> None:
    """Distillation from a served teacher: Supervised KD, SeqKD, on-policy GKD, or a mixture."""
    model, data, generation, teacher, args = parse(
        argv,
        ModelArguments,
        DataArguments,
        GenerationArguments,
        TeacherArguments,
        DistillArguments,
        prog="student-trainer distill",
        description=distill.__doc__ or "",
    )
    check_common(model, data, args)
    check_distill(args, generation, teacher)
    with TeacherClient(
        teacher.teacher_url,
        timeout=teacher.teacher_timeout,
        accept_change=teacher.accept_teacher_change,
    ) as client:
        check_request(client.connect(), args, teacher)
        _train(
            model,
            data,
            generation,
            args,
            teacher=client,
            distill=args,
            top_k=teacher.top_k_logprobs,
        )


def _train(
    model_arguments: ModelArguments,
    data: DataArguments,
    generation: GenerationArguments,
    args: CommonTrainingArguments,
    *,
    teacher: TeacherClient | None,
    distill: DistillArguments | None,
    top_k: int,
) -> None:
    set_seed(args.seed)
    if args.n_gpu > 1:
        raise ConfigurationError(
            f"{args.n_gpu} GPUs are visible to one process; start one process a GPU with "
            "`accelerate launch -m student_trainer …`, or set CUDA_VISIBLE_DEVICES to one"
        )
    tokenizer = load_tokenizer(model_arguments)
    config = load_config(model_arguments)
    rows = int(config.get_text_config().vocab_size)
    context = context_length(config)
    if teacher is not None:
        check_vocabulary(tokenizer, rows, teacher.info)
        rows = min(rows, teacher.info.vocab_size)
        context = min(context, teacher.info.max_model_len)
    if distill is not None and distill.request_student_top_m > rows:
        raise ConfigurationError(
            f"--request_student_top_m {distill.request_student_top_m} is over the shared "
            f"vocabulary of {rows}"
        )
    method = _method(args, distill, generation, top_k, load_stop_ids(model_arguments, tokenizer))
    train, held_out = load_examples(data, tokenizer, method, context)
    student = load_student(model_arguments, gradient_checkpointing=args.gradient_checkpointing)
    trainer = DistillationTrainer(
        student,
        args=args,
        method=method,
        beta=0.0 if distill is None else distill.beta,
        teacher=teacher,
        vocab_size=rows,
        tail="bucket" if distill is None else distill.tail,
        sft_weight=0.0 if distill is None else distill.sft_weight,
        kernel=args.loss_kernel,
        student_top_m=0 if distill is None else distill.request_student_top_m,
        rollout_temperature=1.0 if distill is None else distill.rollout_temperature,
        generation_batch_size=generation.generation_batch_size,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
    )
    result = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    trainer.log_metrics("train", result.metrics)
    trainer.save_metrics("train", result.metrics)
    trainer.save_state()
    if args.push_to_hub:
        trainer.push_to_hub()


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
    wanted, most = args.request_student_top_m, info.limits.max_requested_token_ids
    if wanted and not info.capabilities.requested_token_ids:
        raise ConfigurationError(
            f"--request_student_top_m {wanted}: the teacher's backend ({info.teacher.backend}) "
            "cannot score requested ids; use 0"
        )
    if wanted > most:
        raise ConfigurationError(
            f"--request_student_top_m {wanted} is over the teacher's limit of {most}"
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


def load_examples(
    data: DataArguments,
    tokenizer: PreTrainedTokenizerBase,
    method: Method,
    context: int,
) -> tuple[list[Example], list[Example] | None]:
    """Training and held-out examples, checked against what the method needs of each row.

    Raises:
        DatasetError: names the first row that does not do.
    """
    max_length = min(data.max_length or context, context)
    main = PartialState().is_main_process

    def load(name: str, split: str, what: str) -> list[Example]:
        rows = load_rows(name, config=data.dataset_config, split=split)
        return tokenize_rows(
            rows,
            tokenizer,
            method.stop_ids,
            data,
            max_length=max_length,
            description=f"Tokenizing {what}",
            progress=main,
        )

    train = load(data.dataset_name, data.dataset_split, "training rows")
    _check_rows(train, method, max_length)
    held_out = None
    if data.eval_dataset_name:
        held_out = load(data.eval_dataset_name, data.eval_dataset_split, "held-out rows")
        for example in held_out:
            if example.checker is not None:
                parse_checker(example.checker, example.name)
                _check_room(example, method, max_length)
    cut = sum(example.sample.truncated for example in train if example.sample is not None)
    if cut and main:
        logger.warning("%d of %d completions are cut at %d tokens", cut, len(train), max_length)
    return train, held_out


def _check_rows(examples: list[Example], method: Method, max_length: int) -> None:
    for example in examples:
        if method.lmbda < 1 and not method.seq_kd:
            dataset_sample(example)
        if method.lmbda > 0 or method.seq_kd:
            _check_room(example, method, max_length)


def _check_room(example: Example, method: Method, max_length: int) -> None:
    length = len(example.prompt_ids) + method.max_new_tokens
    if length > max_length:
        raise DatasetError(
            f"{example.name}: a prompt of {len(example.prompt_ids)} tokens and --max_new_tokens "
            f"{method.max_new_tokens} make {length} tokens; the limit is {max_length}. Lower "
            "--max_new_tokens, raise --max_length or leave the row out"
        )


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
    )

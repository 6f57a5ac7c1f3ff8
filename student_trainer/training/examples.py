"""The making of examples from rows, each checked for what the method needs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from accelerate import PartialState

from shared.errors import (
    RowTooLongError,
)
from shared.text import check_round_trip
from student_trainer.config.arguments import divergence_flags_of
from student_trainer.config.training_arguments import CommonTrainingArguments
from student_trainer.data.check import check_token_ids, texts_of
from student_trainer.data.examples import RowTokenizer, row_of
from student_trainer.data.mixture import mix
from student_trainer.data.rows import (
    Row,
)
from student_trainer.data.sample import Example
from student_trainer.data.sources import Rows
from student_trainer.data.stream import ExampleStream, RowStream
from student_trainer.data.tokenize import keep_short, tokenize_rows
from student_trainer.data.turn import NOTES
from student_trainer.evaluation.checkers import parse_checker
from student_trainer.pipeline.method import DistillationConfig
from student_trainer.pipeline.pipeline import dataset_sample
from student_trainer.training.counting import completions_of_step

logger = logging.getLogger(__name__)

_TRIED_ROWS = 16  # their texts are encoded and decoded before a model loads


def make_examples(
    rows: Rows,
    row_tokenizer: RowTokenizer,
    method: DistillationConfig,
    context: int,
    args: CommonTrainingArguments,
    vocab_size: int,
) -> tuple[list[Example] | ExampleStream, list[Example] | None]:
    """Return training and held-out examples, each checked for what the method needs.

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

    of_training = rows.train

    def tokenize(
        rows: Sequence[Row], what: str, check: Callable[[Example, DistillationConfig, int], Example]
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
            learned = method.reads_dataset or rows is not of_training
            _warn_of_losses(rows, checked, max_length, learned=learned)
        return checked

    train: list[Example] | ExampleStream
    if isinstance(rows.train, RowStream):
        repeats = divergence_flags_of(args).num_generations

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
            length=args.max_steps * completions_of_step(args) // repeats,
            skip=skip,
            rank=args.process_index,
            world=args.world_size,
        )
        _ = train[0]  # a fault of all rows is reported now, not in the first step
    else:
        train = tokenize(rows.train, "training rows", _usable)
        if rows.mixture is not None:
            train, lines = mix(train, rows.mixture)
            for line in lines if main else ():
                logger.warning("%s", line)
    held_out = None
    if rows.held_out is not None:
        held_out = tokenize(rows.held_out, "held-out rows", _checkable)
    return train, held_out


def _warn_of_losses(
    rows: Sequence[Any], examples: Sequence[Example], max_length: int, *, learned: bool
) -> None:
    left_out = len(rows) - len({row_of(example) for example in examples})
    if left_out:
        logger.warning("%d of %d rows are left out: too long", left_out, len(rows))
    cut = sum(example.sample.truncated for example in examples if example.sample is not None)
    if cut:
        logger.warning("%d of %d completions are cut at %d tokens", cut, len(examples), max_length)
    for note, warning in NOTES.items() if learned else ():
        count = sum(note in example.notes for example in examples)
        if count:
            logger.warning("%d of %d completions %s", count, len(examples), warning)


def _usable(example: Example, method: DistillationConfig, max_length: int) -> Example:
    """Return the example, after a check that the method can learn from it."""
    if method.reads_dataset:
        dataset_sample(example)
    if method.lmbda > 0 or method.seq_kd:
        _check_room(example, method, max_length)
    return example


def _checkable(example: Example, method: DistillationConfig, max_length: int) -> Example:
    """Return the held-out example, after a check that its checker, if any, can be used."""
    if example.checker is not None:
        parse_checker(example.checker, example.name)
        _check_room(example, method, max_length)
    return example


def _check_room(example: Example, method: DistillationConfig, max_length: int) -> None:
    length = len(example.prompt_ids) + method.max_new_tokens
    if length > max_length:
        raise RowTooLongError(
            f"{example.name}: a prompt of {len(example.prompt_ids)} tokens and --max_new_tokens "
            f"{method.max_new_tokens} make {length} tokens; the limit is {max_length}: lower "
            "--max_new_tokens if completions may be shorter"
        )

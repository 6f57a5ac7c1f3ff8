"""The prompts and references of an evaluation, tokenized for its model."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from shared.errors import ConfigurationError, DatasetError
from student_trainer.config.arguments import (
    DataArguments,
    EvaluateArguments,
    GenerationArguments,
    ModelArguments,
    TemplateArguments,
)
from student_trainer.data.examples import RowTokenizer
from student_trainer.data.sample import Sample
from student_trainer.data.template import TemplateOptions
from student_trainer.data.template_date import read_date
from student_trainer.data.tokenize import tokenize_rows
from student_trainer.evaluation.suites import Problem
from student_trainer.model.load import (
    context_length,
    load_config,
    load_stop_ids,
    load_text_end,
    load_tokenizer,
)
from student_trainer.rollouts import RolloutRequest

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelParts:
    """The parts of a model besides its weights, loaded once.

    Attributes:
        stop_ids: tokens that end a completion.
        text_end: the token that ends plain text; None for the first of ``stop_ids``.
        rows: of the output layer.
        context: longest sequence, in tokens.
    """

    tokenizer: PreTrainedTokenizerBase
    stop_ids: tuple[int, ...]
    text_end: int | None
    rows: int
    context: int


def load_parts(model: ModelArguments) -> ModelParts:
    """Return the parts of a model, without loading its weights."""
    config, tokenizer = load_config(model), load_tokenizer(model)
    rows = int(config.get_text_config().vocab_size)
    stop_ids = tuple(load_stop_ids(model, tokenizer))
    text_end = load_text_end(model, tokenizer)
    return ModelParts(tokenizer, stop_ids, text_end, rows, context_length(config))


def _row_tokenizer(parts: ModelParts, template: TemplateOptions) -> RowTokenizer:
    return RowTokenizer(
        parts.tokenizer,
        parts.stop_ids,
        DataArguments(),
        parts.context,
        template,
        text_end=parts.text_end,
    )


def template_options(template: TemplateArguments, model: ModelArguments) -> TemplateOptions:
    """Return the options of the flags; the date is that of the model's training, if it has one."""
    folder = Path(model.model_name_or_path)
    return TemplateOptions(template.kwargs, read_date(template.chat_template_date, [folder]))


def prompt_style(problems: Sequence[Problem], args: EvaluateArguments) -> str:
    """Return the form of HumanEval's prompts, or "" for other rows.

    Raises:
        ConfigurationError: ``--raw_prompt`` has no effect.
    """
    style = problems[0].asked
    if style:
        logger.info("HumanEval is asked by %s", style)
    elif args.raw_prompt:
        raise ConfigurationError(
            "--raw_prompt has no effect: of HumanEval's rows alone there are two ways to ask; "
            "leave it out"
        )
    return style


def rollout_requests(
    problems: Sequence[Problem],
    parts: ModelParts,
    generation: GenerationArguments,
    template: TemplateOptions,
    args: EvaluateArguments,
) -> list[RolloutRequest]:
    """Return n requests for each prompt, whose keys make samples independent of their batch.

    Raises:
        DatasetError: a prompt leaves no room for a completion.
    """
    limit = parts.context
    rows = [(problem.task_id, problem.row) for problem in problems]
    examples = tokenize_rows(
        rows,
        _row_tokenizer(parts, template),
        remedy="That is the context of the model; take one with a longer context",
    )
    for example in examples:
        if len(example.prompt_ids) + generation.max_new_tokens > limit:
            raise DatasetError(
                f"{example.name}: a prompt of {len(example.prompt_ids)} tokens leaves less than "
                f"--max_new_tokens {generation.max_new_tokens} of the context of {limit}; lower it"
            )
    return [
        RolloutRequest(example.prompt_ids, ("evaluate", args.seed, example.index, number))
        for example in examples
        for number in range(args.n)
    ]


def reference_samples(
    problems: Sequence[Problem],
    parts: ModelParts,
    template: TemplateOptions,
    *,
    required: bool,
) -> list[Sample]:
    """Return the right answers as samples, cut at the model's context.

    Raises:
        DatasetError: they are ``required``, and one cannot be separated from its prompt.
    """
    rows = [(p.task_id, p.answered) for p in problems if p.answered is not None]
    try:
        examples = tokenize_rows(
            rows,
            _row_tokenizer(parts, template),
        )
    except DatasetError as error:  # generating works with templates that rewrite turns
        if required:
            raise
        logger.warning("No perplexity of the references: %s", error)
        return []
    return [example.sample for example in examples if example.sample is not None]

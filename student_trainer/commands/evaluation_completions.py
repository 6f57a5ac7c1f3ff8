"""The completions of an evaluation, written by an engine and kept in its journal."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from shared.text import StopSearch, StopStrings, completion_text
from student_trainer.commands.evaluation_prompts import ModelParts
from student_trainer.config.arguments import EvaluateArguments, GenerationArguments
from student_trainer.evaluation.journal import EvaluationJournal
from student_trainer.evaluation.suites import Problem
from student_trainer.rollouts import (
    RolloutEngine,
    RolloutRequest,
    TransformersRollouts,
    VllmEngine,
    VllmRollouts,
)
from student_trainer.runtime.progress import counted

logger = logging.getLogger(__name__)


def generate_completions(
    model: Any,
    requests: Sequence[RolloutRequest],
    problems: Sequence[Problem],
    parts: ModelParts,
    generation: GenerationArguments,
    args: EvaluateArguments,
    journal: EvaluationJournal,
) -> None:
    """Generate the completions that the journal does not have, and add them."""
    missing = [number for number in range(len(requests)) if number not in journal.texts]
    if not missing:
        return
    if journal.texts:
        logger.warning("%d of %d completions are there already", len(journal.texts), len(requests))
    stops = StopStrings(problems[0].stop_strings)  # the same for all rows of one form
    vocab_size = min(len(parts.tokenizer), model.get_output_embeddings().weight.shape[0])
    longest = max(len(request.prompt_ids) for request in requests) + generation.max_new_tokens
    with (
        _engine(model, generation, args, parts, stops, vocab_size, longest) as engine,
        counted(len(missing), "Generating") as count,
    ):
        for group in engine.generate([requests[number] for number in missing]):
            for index, rollout in group:
                number = missing[index]
                prompt_ids = requests[number].prompt_ids
                text = completion_text(parts.tokenizer, prompt_ids, rollout.token_ids)
                text, stopped = stops.cut(text)
                journal.add(number, text, truncated=rollout.truncated and not stopped)
            count(len(group))


@contextmanager
def _engine(
    model: Any,
    generation: GenerationArguments,
    args: EvaluateArguments,
    parts: ModelParts,
    stops: StopStrings,
    vocab_size: int,
    longest: int,
) -> Iterator[RolloutEngine]:
    """Yield the engine for sequences of up to ``longest`` tokens, prompt and completion."""
    search = partial(StopSearch, parts.tokenizer, stops=stops) if stops.texts else None
    if args.rollout_engine == "transformers":
        yield TransformersRollouts(
            model,
            stop_ids=parts.stop_ids,
            pad_token_id=parts.stop_ids[0],
            max_new_tokens=generation.max_new_tokens,
            temperature=args.temperature,
            batch_size=generation.generation_batch_size or 32,
            vocab_size=vocab_size,
            stop_strings=search,
        )
        return
    with VllmEngine(
        model,
        max_model_len=longest,
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        gpu_memory_utilization=args.vllm_gpu_memory_utilization,
        max_num_seqs=generation.generation_batch_size,
    ) as engine:
        rollouts = VllmRollouts(
            engine,
            stop_ids=parts.stop_ids,
            max_new_tokens=generation.max_new_tokens,
            temperature=args.temperature,
            vocab_size=vocab_size,
            stop_strings=search,
        )
        rollouts.sync(0)
        yield rollouts

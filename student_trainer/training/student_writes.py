"""The completions that the student writes in a run, and the ids that it proposes."""

from __future__ import annotations

from typing import Any

from student_trainer.model.top_tokens import TopTokenProposals
from student_trainer.rollouts import (
    NO_FILTER,
    RolloutEngine,
    RolloutServers,
    TokenFilter,
    TransformersRollouts,
    VllmEngine,
)
from student_trainer.training.micro_batch import MicroBatchBuilder
from student_trainer.training.plan import TrainingPlan


def training_rollouts(
    model: Any,
    plan: TrainingPlan,
    engine: VllmEngine | RolloutServers | None,
    *,
    pad_token_id: int,
) -> RolloutEngine:
    """Return what writes the completions to learn from, as the plan samples them.

    Args:
        model: the student, which writes them where ``engine`` is None.
    """
    return _rollouts(
        model,
        plan,
        engine,
        pad_token_id=pad_token_id,
        temperature=plan.rollout_temperature,
        batch_size=plan.generation_batch_size,
        token_filter=plan.token_filter,
        student_top_m=plan.student_top_m,
    )


def greedy_rollouts(
    model: Any,
    plan: TrainingPlan,
    engine: VllmEngine | RolloutServers | None,
    *,
    pad_token_id: int,
    batch_size: int,
) -> RolloutEngine:
    """Return what writes the completions of held-out rows: the most probable tokens.

    Args:
        batch_size: prompts generated at once, where the plan does not say it.
    """
    return _rollouts(
        model,
        plan,
        engine,
        pad_token_id=pad_token_id,
        temperature=0.0,
        batch_size=plan.generation_batch_size or batch_size,
        token_filter=NO_FILTER,
        student_top_m=0,
    )


def _rollouts(
    model: Any,
    plan: TrainingPlan,
    engine: VllmEngine | RolloutServers | None,
    *,
    pad_token_id: int,
    temperature: float,
    batch_size: int | None,
    token_filter: TokenFilter,
    student_top_m: int,
) -> RolloutEngine:
    if engine is not None:
        return engine.rollouts(
            stop_ids=plan.method.stop_ids,
            max_new_tokens=plan.method.max_new_tokens,
            temperature=temperature,
            vocab_size=plan.vocab_size,
            token_filter=token_filter,
            student_top_m=student_top_m,
        )
    return TransformersRollouts(
        model,
        stop_ids=plan.method.stop_ids,
        pad_token_id=pad_token_id,
        max_new_tokens=plan.method.max_new_tokens,
        temperature=temperature,
        batch_size=batch_size,
        vocab_size=plan.vocab_size,
        token_filter=token_filter,
        one_group=student_top_m > 0,  # the student proposes ids between groups
    )


def proposals(
    model: Any, plan: TrainingPlan, builder: MicroBatchBuilder, batch_size: int
) -> TopTokenProposals | None:
    """Return what finds the student's most probable ids, or None if the plan asks for none."""
    if plan.student_top_m == 0:
        return None
    return TopTokenProposals(
        model,
        count=plan.student_top_m,
        vocab_size=plan.vocab_size,
        pad_token_id=builder.pad_token_id,
        batch_size=batch_size,
        packed=builder.packed,
    )

"""A check of sharded models whose positions depend on the longest sequence."""

from __future__ import annotations

from typing import Any

from shared.errors import ConfigurationError
from shared.rope import length_dependent_rope


def check_positions(
    config: Any, *, longest: int | None, batch_sizes: set[int], regrouped: bool
) -> None:
    """Check that all ranks compute a micro-batch in the same number of forward passes.

    Args:
        config: of the model, whose weights are sharded over ranks.
        longest: tokens of the longest sequence there may be; None where that is not known.
        batch_sizes: samples in a micro-batch, of training and of evaluation.
        regrouped: micro-batches are made by a budget of tokens.

    Raises:
        ConfigurationError: a micro-batch may hold sequences of either side of the length at which
            the model changes its positions.
    """
    rope = length_dependent_rope(config)
    if rope is None:
        return
    most = rope.original - 1 if rope.each_length else rope.original
    if longest is not None and longest <= most:
        return
    # Where each length has frequencies of its own, even one sequence may take two passes.
    if not rope.each_length and batch_sizes == {1} and not regrouped:
        return
    remedy = f"pass --max_length {most}"
    if not rope.each_length:
        remedy += (
            ", or --per_device_train_batch_size 1 and --per_device_eval_batch_size 1 "
            "without --max_tokens_per_batch"
        )
    raise ConfigurationError(
        f"sharded over ranks, a model that changes its positions at {rope.original} tokens "
        f"must take as many forward passes on each rank: {remedy}"
    )

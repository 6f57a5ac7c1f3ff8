"""The plan of a run, one value that is handed to the trainer whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from student_trainer.losses import Kernel
from student_trainer.model.packing import Packing
from student_trainer.pipeline.method import DistillationConfig
from student_trainer.rollouts import NO_FILTER, TokenFilter


@dataclass(frozen=True)
class TrainingPlan:
    """The method and the options of a run, besides transformers' `TrainingArguments`.

    Attributes:
        method: lmbda, seq_kd and the like, and the divergence.
        vocab_size: the vocabulary that teacher and student share.
        sft_weight: share of the cross-entropy on what the dataset or the teacher wrote.
        kernel: who computes the loss.
        student_top_m: how many of the student's most probable tokens the teacher scores too, at
            each position, in training alone: held-out rows keep one support, to be compared.
        rollout_temperature, token_filter: of the student's sampling.
        num_generations: the student's completions of each prompt in a step.
        generation_batch_size: prompts generated at once; None for as many as a step has.
        max_tokens_per_batch: regroups a step's samples into micro-batches of at most so many
            tokens, padding included; None for those of the data loader's size.
        packing: whether a micro-batch is one row of sequences instead of padded ones.
        longest: tokens of the longest sequence there may be; None where that is not known.
        staleness, prefetch_steps: see `Pipeline`.
        trace_steps: (first, last) step to trace, counted from 1, in ``trace.json`` in the output
            folder; on the main process alone.
        inputs: what the run is trained with, for its checkpoints; see `training.inputs`.
        card: README.md's text, by the model's name and what was logged; None for the Trainer's.
    """

    method: DistillationConfig
    vocab_size: int
    sft_weight: float = 0.0
    kernel: Kernel = "auto"
    student_top_m: int = 0
    rollout_temperature: float = 1.0
    token_filter: TokenFilter = NO_FILTER
    num_generations: int = 1
    generation_batch_size: int | None = None
    max_tokens_per_batch: int | None = None
    packing: Packing = "auto"
    longest: int | None = None
    staleness: int = 0
    prefetch_steps: int = 0
    trace_steps: tuple[int, int] | None = None
    inputs: Mapping[str, Any] | None = None
    card: Callable[[str, list[dict[str, Any]]], str] | None = None

"""The part of `--dry_run` about the teacher: its identity, its scores of a few rows, traffic."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from student_trainer.commands.dry_run_rows import SHOWN_ROWS
from student_trainer.config.arguments import TeacherArguments
from student_trainer.config.training_arguments import CommonTrainingArguments, DistillArguments
from student_trainer.data.sample import Example, Sample
from student_trainer.pipeline.targets import ScoredSample, sparse_distribution
from student_trainer.runtime.terminal import readable_size
from student_trainer.teacher.base import Teacher

if TYPE_CHECKING:
    from student_trainer.training.recipe import Prepared

_SECONDS = 30.0  # to wait for the teacher


def dry_run_flags(teacher_flags: TeacherArguments) -> TeacherArguments:
    """Return the teacher's flags with a short default timeout and without a cache."""
    is_default = teacher_flags.teacher_timeout == TeacherArguments.teacher_timeout
    seconds = _SECONDS if is_default else teacher_flags.teacher_timeout
    return replace(teacher_flags, teacher_timeout=seconds, teacher_cache=None)


def describe_teacher(teacher: Teacher, prepared: Prepared) -> list[tuple[str, str]]:
    """Return lines about a teacher's identity, vocabulary and limits."""
    info = teacher.info
    who, limits = info.teacher, info.limits
    return [
        ("teacher", f"{who.model}: {who.dtype}, {who.backend} {who.version}, fingerprint "
                    f"{who.fingerprint[:16]}"),
        ("vocabulary", f"agrees: {prepared.vocab_size:,} tokens are shared, of the teacher's "
                       f"{info.vocab_size:,}"),
        ("limits", f"context {info.max_model_len:,}, top-k {limits.max_top_k:,}; a request of "
                   f"{limits.max_sequences:,} sequences, {limits.max_tokens:,} tokens"),
    ]  # fmt: skip


def describe_scores(teacher: Teacher, prepared: Prepared) -> list[tuple[str, str]]:
    """Return lines about the teacher's scores of the first rows' completions or bare prompts.

    Raises:
        TeacherError: it does not score them.
    """
    method = prepared.method
    samples = [_sample(example) for example in prepared.train[:SHOWN_ROWS]]
    samples = [sample for sample in samples if len(sample.completion_mask)]
    if not samples:
        return [("scored", "nothing: the prompts have a single token")]
    sequences = [(sample.token_ids, sample.completion_start) for sample in samples]
    scores = teacher.score(sequences, method.scoring())
    items = [ScoredSample(sample, score) for sample, score in zip(samples, scores, strict=True)]
    found = sparse_distribution(items, prepared.vocab_size)
    logs = torch.cat([found.logprobs, found.tail_logprob[:, None]], dim=1).double()  # [N, K + 1]
    entropy = -torch.where(logs > -torch.inf, logs.exp() * logs, 0.0).sum(dim=1).mean()
    of_next = found.logprobs[:, 0].mean()  # the next token is the first of the support
    bare = not any(example.sample for example in prepared.train[:SHOWN_ROWS])
    what = "bare prompts" if bare else "completions"
    own = ", of prompts, which says nothing of completions" if bare else ", of the rows' own tokens"
    return [
        ("scored", f"{len(samples)} rows, {len(logs):,} tokens of their {what}; the mean of each:"),
        ("entropy", f"{entropy:.3f} nats, of the top-k and the tail as one outcome"),
        ("top-k mass", f"{1 - found.tail_logprob.exp().mean():.4f}"),
        ("cross-entropy", f"{-of_next:.3f} nats{own}"),
    ]


def describe_traffic(
    teacher: Teacher, flags: TeacherArguments, args: CommonTrainingArguments, tokens: float
) -> list[tuple[str, str]]:
    """Return lines about the bytes of answers; ``tokens`` are the completion tokens of a step."""
    assert isinstance(args, DistillArguments)  # no other command has a teacher
    received, scored = teacher.take_traffic()
    found = f"{received / scored:,.0f} measured in these short ones" if scored else ""
    if flags.teacher_protocol == "vllm":
        return [("traffic", f"bytes a completion token: {found}")]
    each = token_bytes(flags, args.student_top_m)
    k, dtype = flags.top_k_logprobs, flags.teacher_logprob_dtype
    return [
        ("traffic", f"{each:,} bytes a completion token (k = {k}, {dtype}); {found}"),
        ("", f"up to {readable_size(each * tokens)} a step"),
    ]


def token_bytes(flags: TeacherArguments, student_top_m: int) -> int:
    """Return the bytes of an answer's arrays at each completion token.

    They are ids and log-probs of the top-k, the log-probs of next token and tail, and those of
    requested ids. The rest of an answer is some 250 bytes a sequence.
    """
    size = 2 if flags.teacher_logprob_dtype == "float16" else 4
    return flags.top_k_logprobs * (4 + size) + 4 + 4 + student_top_m * size


def _sample(example: Example) -> Sample:
    """Return the row's own completion, or else all of the prompt but its first token."""
    if example.sample is not None:
        return example.sample
    mask = np.ones(len(example.prompt_ids) - 1, dtype=bool)
    return Sample(example.prompt_ids, 1, mask, "dataset")

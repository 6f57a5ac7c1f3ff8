"""The part of `--dry_run` about the teacher: its identity, its scores of a few rows, traffic."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from student_trainer.commands.dry_run_rows import SHOWN_ROWS
from student_trainer.config.arguments import TeacherArguments
from student_trainer.config.training_arguments import CommonTrainingArguments, DistillArguments
from student_trainer.data.sample import Example, Sample
from student_trainer.pipeline.targets import ScoredSample, sparse_distribution
from student_trainer.runtime.terminal import readable_size
from student_trainer.teacher.base import Teacher
from student_trainer.teacher.named import Teachers
from student_trainer.training.small_mass import warning_of_mass

if TYPE_CHECKING:
    from student_trainer.training.recipe import Prepared

_SECONDS = 30.0  # to wait for the teacher


def dry_run_flags(teacher_flags: TeacherArguments) -> TeacherArguments:
    """Return the teacher's flags with a short default timeout and without a cache."""
    is_default = teacher_flags.teacher_timeout == TeacherArguments.teacher_timeout
    seconds = _SECONDS if is_default else teacher_flags.teacher_timeout
    return replace(teacher_flags, teacher_timeout=seconds, teacher_cache=None)


def describe_teacher(name: str, teacher: Teacher, prepared: Prepared) -> list[tuple[str, str]]:
    """Return lines about a teacher's identity, vocabulary and limits.

    Args:
        name: the teacher's, or empty.
    """
    info = teacher.info
    who, limits = info.teacher, info.limits
    return [
        (f"teacher {name}".strip(), f"{who.model}: {who.dtype}, {who.backend} {who.version}, "
                                    f"fingerprint {who.fingerprint[:16]}"),
        ("vocabulary", f"agrees: {prepared.vocab_size:,} tokens are shared, of the teacher's "
                       f"{info.vocab_size:,}"),
        ("limits", f"context {info.max_model_len:,}, top-k {limits.max_top_k:,}; a request of "
                   f"{limits.max_sequences:,} sequences, {limits.max_tokens:,} tokens"),
    ]  # fmt: skip


def describe_scores(
    teachers: Teachers, prepared: Prepared, student_top_m: int
) -> list[tuple[str, str]]:
    """Return lines about the scores of the first rows' completions or bare prompts.

    Args:
        student_top_m: ids that the student adds to the support, so that a larger k is no remedy.

    Raises:
        TeacherError: it does not score them.
    """
    method = prepared.method
    pairs = [(example, _sample(example)) for example in prepared.train[:SHOWN_ROWS]]
    samples = [(example, sample) for example, sample in pairs if len(sample.completion_mask)]
    if not samples:
        return [("scored", "nothing: the prompts have a single token")]
    items = []
    for teacher, part in teachers.by_teacher(samples, lambda pair: pair[0].teacher):
        sequences = [_sequence(example, sample) for example, sample in part]
        scores = teacher.score(sequences, method.scoring())
        items += [ScoredSample(s, score) for (_, s), score in zip(part, scores, strict=True)]
    found = sparse_distribution(items, prepared.vocab_size)
    logs = torch.cat([found.logprobs, found.tail_logprob[:, None]], dim=1).double()  # [N, K + 1]
    entropy = -torch.where(logs > -torch.inf, logs.exp() * logs, 0.0).sum(dim=1).mean()
    of_next = found.logprobs[:, 0].mean()  # the next token is the first of the support
    bare = not any(example.sample for example in prepared.train[:SHOWN_ROWS])
    mass = float(1 - found.tail_logprob.exp().mean())
    advice = "" if bare or method.sampled or student_top_m else warning_of_mass(mass)
    what = "bare prompts" if bare else "completions"
    own = ", of prompts, which says nothing of completions" if bare else ", of the rows' own tokens"
    return [
        ("scored", f"{len(samples)} rows, {len(logs):,} tokens of their {what}; the mean of each:"),
        ("entropy", f"{entropy:.3f} nats, of the top-k and the tail as one outcome"),
        ("top-k mass", f"{mass:.4f}{f': {advice}' if advice else ''}"),
        ("cross-entropy", f"{-of_next:.3f} nats{own}"),
    ]


def describe_traffic(
    teachers: Teachers, flags: TeacherArguments, args: CommonTrainingArguments, tokens: float
) -> list[tuple[str, str]]:
    """Return lines about the bytes of answers; ``tokens`` are the completion tokens of a step."""
    assert isinstance(args, DistillArguments)  # no other command has a teacher
    traffic = teachers.take_traffic().values()
    received, scored = (sum(column) for column in zip(*traffic, strict=True))
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
    requested ids. The rest of an answer is some 200 bytes, and 200 a sequence.
    """
    size = 2 if flags.teacher_logprob_dtype == "float16" else 4
    return flags.top_k_logprobs * (4 + size) + 4 + 4 + student_top_m * size


def _sequence(example: Example, sample: Sample) -> tuple[NDArray[np.uint32], int]:
    """Return what the teacher scores: of a bare prompt, all of it but its first token."""
    if example.sample is None:
        return sample.token_ids, sample.completion_start
    return example.sequence_of_teacher(sample)


def _sample(example: Example) -> Sample:
    """Return the row's own completion, or else all of the prompt but its first token."""
    if example.sample is not None:
        return example.sample
    mask = np.ones(len(example.prompt_ids) - 1, dtype=bool)
    return Sample(example.prompt_ids, 1, mask, "dataset")

"""A file of a few held-out samples token by token, for `student-trainer report`.

Each evaluation writes ``_held_out_samples.json`` into the output folder: for the first tokens of a
few samples, evenly spaced among the rows, the divergence and the most probable tokens of teacher
and student. Only the first and the latest evaluation are kept, so that the file stays small.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shared.text import token_pieces, token_text
from student_trainer.losses import SparseDistribution, sparse_generalized_jsd
from student_trainer.model.forward import PositionLogits, SparseTargets
from student_trainer.pipeline.targets import ScoredSample
from student_trainer.reporting.runs import HELD_OUT_FILE

COUNT, TOKENS, TOP = 4, 200, 5  # samples, tokens of each, alternatives at each token
_TEXT = 4000  # characters of a prompt or a completion
_LEAST = 0.001  # probability of a token that is listed, on either side

# [token, the teacher's probability or None where it is in the tail, the student's].
Support = list[list[Any]]


def cut(item: ScoredSample) -> ScoredSample:
    """Return the sample with only its first learned tokens."""
    mask = item.sample.completion_mask
    return replace(
        item, sample=replace(item.sample, completion_mask=mask & (np.cumsum(mask) <= TOKENS))
    )


@torch.no_grad()
def look(model: Any, inputs: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """Return the student's divergence and most probable tokens on one sample.

    Args:
        model: after `install_sparse_loss`.
        inputs: of its forward pass, with the ``sparse_targets`` of this one sample.

    Returns:
        ``divergence`` [N] in nats, and `Support` [N]: the most probable tokens of either.
    """
    targets: SparseTargets = inputs["sparse_targets"]
    rest = {name: value for name, value in inputs.items() if name != "sparse_targets"}
    wanted = PositionLogits(targets.positions, targets.vocab_size)
    logits = model(**rest, position_logits=wanted)["logits"].float()  # [N, V]
    divergence = sparse_generalized_jsd(
        logits, targets.teacher, targets.divergence, kernel="torch"
    ).loss
    probabilities = (logits / targets.divergence.temperature).softmax(dim=-1)
    return {
        "divergence": [round(value, 4) for value in divergence.tolist()],
        "support": _support(targets.teacher, probabilities, tokenizer),
    }


def described(item: ScoredSample, name: str, prompt: str, tokenizer: Any) -> dict[str, Any]:
    """Return the entry of a `cut` sample that is the same at every evaluation."""
    sample = item.sample
    ids = sample.completion_ids[sample.completion_mask].tolist()
    return {
        "name": name,
        "prompt": prompt[-_TEXT:],
        "source": sample.source,
        "tokens": token_pieces(tokenizer, sample.token_ids[: sample.completion_start], ids),
    }


def write(
    folder: Path,
    samples: Sequence[dict[str, Any]],
    looks: Sequence[dict[str, Any]],
    written: Sequence[tuple[str, bool] | None],
    *,
    step: int,
    first: dict[str, Any] | None,
    **method: Any,
) -> dict[str, Any]:
    """Write the file, and return its content.

    Args:
        samples: what `described` returned.
        looks: what `look` returned for them now.
        written: the student's own completion and whether it is right, where it has written one.
        step: of the optimizer.
        first: the content that an earlier evaluation of this run returned.
        method: beta and the like, and ``rows``, of which the samples are a few.
    """
    entries = []
    known = [] if first is None else first["samples"]
    for sample, seen, own in zip(samples, looks, written, strict=True):
        evaluation: dict[str, Any] = {"step": step, **seen}
        if own is not None:
            evaluation |= {"completion": own[0][:_TEXT], "passed": own[1]}
        same = [one for one in known if one["tokens"] == sample["tokens"]]
        earlier = [one["evaluations"][0] for one in same if one["evaluations"][0]["step"] < step]
        entries.append({**sample, "evaluations": [*earlier[:1], evaluation]})
    content = {**method, "samples": entries}
    part = folder / f"{HELD_OUT_FILE}.part"
    part.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    part.replace(folder / HELD_OUT_FILE)  # a reader sees the old file or the new one, whole
    return content


def _support(
    teacher: SparseDistribution, probabilities: torch.Tensor, tokenizer: Any
) -> list[Support]:
    """Return the most probable tokens of either side, with both probabilities.

    Args:
        teacher: at N positions.
        probabilities: [N, V], the student's.
    """
    named = torch.where(teacher.token_ids >= 0, teacher.logprobs.float(), -torch.inf)
    theirs = named.topk(min(TOP, named.shape[1])).indices  # [N, TOP], indices of the support
    ours = probabilities.topk(min(TOP, probabilities.shape[1])).indices  # [N, TOP], ids
    rows = []
    for ids, probs, indices, own, shares in zip(
        teacher.token_ids.tolist(), named.exp().tolist(), theirs.tolist(), ours.tolist(),
        probabilities, strict=True,
    ):  # fmt: skip
        known = {i: p for i, p in zip(ids, probs, strict=True) if i >= 0}
        chosen = dict.fromkeys([*(ids[index] for index in indices if ids[index] >= 0), *own])
        row: Support = [
            [
                token_text(tokenizer, i),
                round(known[i], 4) if i in known else None,
                round(float(shares[i]), 4),
            ]
            for i in chosen
        ]
        rows.append([entry for entry in row if max(entry[1] or 0.0, entry[2]) >= _LEAST])
    return rows

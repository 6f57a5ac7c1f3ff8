"""Compute pass@k, and read and write HumanEval's own sample files."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from shared.errors import DatasetError


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Return the unbiased estimate of pass@k from n samples, 1 − C(n−c, k) / C(n, k).

    That is the chance that one of k samples is correct.

    Raises:
        ValueError: fewer than k samples, or more correct ones than samples.

    Source: Codex, arXiv 2107.03374, equation 1.
    """
    if not 1 <= k <= n or not 0 <= correct <= n:
        raise ValueError(f"pass@{k} of {n} samples, {correct} correct: need 1 ≤ k ≤ n, 0 ≤ c ≤ n")
    if n - correct < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(n - correct + 1, n + 1))


def mean_pass_at_k(counts: Sequence[tuple[int, int]], k: int) -> float:
    """Return the mean of `pass_at_k` over problems, each given as (samples, correct)."""
    return sum(pass_at_k(n, correct, k) for n, correct in counts) / len(counts)


def write_samples(path: Path, samples: Iterable[dict[str, Any]]) -> None:
    """Write JSONL with ``task_id`` and ``completion``, which HumanEval's own scorer reads."""
    path.write_text("".join(json.dumps(sample) + "\n" for sample in samples))


def read_samples(path: Path) -> list[dict[str, Any]]:
    """Read a file that `write_samples` wrote.

    Raises:
        DatasetError: names the first line that is no such sample.
    """
    samples = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            sample = json.loads(line)
            if not (isinstance(sample["task_id"], str) and isinstance(sample["completion"], str)):
                raise TypeError
        except (ValueError, TypeError, KeyError) as error:
            raise DatasetError(
                f"{path}:{number}: no task_id and completion in this line"
            ) from error
        samples.append(sample)
    return samples

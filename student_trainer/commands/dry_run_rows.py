"""The part of `--dry_run` that shows the first rows as the student sees them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from shared.printable import printable
from shared.text import Ids, completion_text
from student_trainer.data.sample import Example, Sample
from student_trainer.runtime.terminal import painted

if TYPE_CHECKING:
    from student_trainer.training.recipe import Prepared

SHOWN_ROWS = 4
_CHARACTERS = 600  # shown of a prompt or a completion


def describe_rows(prepared: Prepared, colours: bool) -> Iterator[str]:
    """Yield the lines of the first rows, in which the learned tokens stand out."""
    method = prepared.method
    marked = "green" if colours else "in [[ ]]"
    learns_rows = method.lmbda < 1 and not method.seq_kd
    if learns_rows:
        yield f"The first rows; learned is what is {marked}"
    else:
        writer = "teacher" if method.lmbda < 1 else "student"
        yield f"The first prompts; the {writer} writes the completions, the dataset's are not used"
    for example in prepared.train[:SHOWN_ROWS]:
        sample = example.sample if learns_rows else None
        prompt = len(example.prompt_ids) if sample is None else sample.completion_start
        lengths = f"{prompt:,} tokens of prompt"
        if sample is not None:
            lengths += f", {int(sample.completion_mask.sum()):,} learned"
            lengths += ", cut at the limit" if sample.truncated else ""
        yield f"  {example.name}: {lengths}"
        for line in _rendered(example, sample, prepared, colours).split("\n"):
            yield f"    {line}"


def _rendered(example: Example, sample: Sample | None, prepared: Prepared, colours: bool) -> str:
    if sample is None:
        return painted(_text(prepared, example.prompt_ids), "dim", colours)
    learned = np.concatenate([np.zeros(sample.completion_start, bool), sample.completion_mask])
    changes = np.flatnonzero(learned[1:] != learned[:-1]) + 1
    text = ""
    for start, ids, mask in zip(
        [0, *changes],
        np.split(sample.token_ids, changes),
        np.split(learned, changes),
        strict=True,
    ):
        piece = _text(prepared, ids, sample.token_ids[:start])
        if mask[0]:
            text += painted(piece, "green", True) if colours else f"[[{piece}]]"
        else:
            text += painted(piece, "dim", colours)
    return text


def _text(prepared: Prepared, ids: NDArray[np.uint32], before: Ids = ()) -> str:
    text = printable(completion_text(prepared.tokenizer, before, ids, skip_special_tokens=False))
    left_out = len(text) - _CHARACTERS
    if left_out <= 0:
        return text
    half = _CHARACTERS // 2
    return f"{text[:half]} ... {left_out:,} characters ... {text[-half:]}"

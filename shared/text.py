"""Text of token ids as they stand in a longer text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_CONTEXT = 8  # tokens of the prompt that are decoded with the completion


def completion_text(
    tokenizer: Any,
    prompt_ids: Sequence[int] | NDArray[np.integer[Any]],
    completion_ids: Sequence[int] | NDArray[np.integer[Any]],
    *,
    skip_special_tokens: bool = True,
) -> str:
    """Return what a completion adds to the text of its prompt.

    Decoded alone, SentencePiece tokenizers would drop its first space.

    Args:
        prompt_ids: [P].
        completion_ids: [T].
        skip_special_tokens: leave special tokens out of the text.
    """

    def decode(ids: Iterable[int]) -> str:
        return str(tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens))

    context = [int(i) for i in prompt_ids[-_CONTEXT:]]
    before = decode(context).rstrip("\N{REPLACEMENT CHARACTER}")
    return decode([*context, *(int(i) for i in completion_ids)])[len(before) :]

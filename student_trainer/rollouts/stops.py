"""Strings that end a completion, found while it is written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from shared.text import completion_text


def cut(text: str, stop_strings: Sequence[str]) -> tuple[str, bool]:
    """Return the text before its first stop string, and whether there is one."""
    ends = [at for stop in stop_strings if (at := text.find(stop)) >= 0]
    return text[: min(ends, default=len(text))], bool(ends)


class StopStrings:
    """Whether completions have come to one of some strings.

    Each step decodes only as many last tokens as the longest string has bytes. What is found there
    counts once the whole text holds it, so that `cut` finds it too.

    Args:
        tokenizer: of the completions.
        strings: each ends a completion; not part of its text.
    """

    def __init__(self, tokenizer: Any, strings: Sequence[str]) -> None:
        self.tokenizer = tokenizer
        self.strings = tuple(strings)
        self._window = max(len(stop.encode()) for stop in self.strings)

    def end(self, prompt_ids: Any, token_ids: Sequence[int]) -> bool:
        """Return whether the completion [T] of a prompt [P] holds a string; asked at each token."""
        # One more token than the string has bytes: a decoder may change the first one's space.
        tail = self.tokenizer.decode(list(token_ids[-self._window - 1 :]), skip_special_tokens=True)
        if not cut(tail, self.strings)[1]:
            return False
        return cut(completion_text(self.tokenizer, prompt_ids, token_ids), self.strings)[1]

"""Strings that end a completion, found while it is written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from shared.text import Ids, StopStrings, completion_text


class StopDetector:
    """A check whether a completion has come to one of some strings, made at each token.

    It decodes only as many last tokens as the longest string has bytes. What is found there counts
    once the whole text holds it, so that `StopStrings.cut` finds it too.

    Args:
        tokenizer: of the completions.
        strings: each ends a completion.
    """

    def __init__(self, tokenizer: Any, strings: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._stops = StopStrings(tuple(strings))
        self._window = max(len(stop.encode()) for stop in strings)

    def end(self, prompt_ids: Ids, token_ids: Sequence[int]) -> bool:
        """Return whether the completion [T] of a prompt [P] holds a string."""
        # One more token than the string has bytes: a decoder may change the first one's space.
        size = self._window + 1
        last = [*prompt_ids[-size:], *token_ids[-size:]][-size:]
        tail = self._tokenizer.decode(last, skip_special_tokens=True)
        if self._stops.find(tail) is None:
            return False
        text = completion_text(self._tokenizer, prompt_ids, token_ids)
        return self._stops.find(text) is not None

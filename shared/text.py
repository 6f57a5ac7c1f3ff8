"""Decode token ids to text in the context of the tokens before them.

A part decoded alone may differ from its share of the whole text: a SentencePiece tokenizer drops
the first space of whatever it decodes, and a character may be split between two tokens. So the text
of a completion is what the completion adds to the end of its prompt.

Tokenizers are those of transformers, or anything with their ``encode``-like call and ``decode``.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.errors import DatasetError

Ids = Sequence[int] | NDArray[np.integer[Any]]

_CONTEXT = 16  # tokens of a prompt that are decoded with a completion
_HELD = 32  # tokens that may wait for the rest of a character
_INCOMPLETE = "\ufffd"  # what a decoder gives for an incomplete character
_SHOWN = 24  # characters of a text on either side of a difference


def encoded(tokenizer: Any, text: str) -> list[int]:
    """Return the ids of a text alone, without special tokens around it.

    transformers would warn of a text longer than the model's context, which callers check.
    """
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return [int(i) for i in ids]


def decoded(tokenizer: Any, token_ids: Ids, *, skip_special_tokens: bool = True) -> str:
    """Return the text of token ids alone, with unchanged white space.

    Each incomplete character becomes one U+FFFD, also where a tokenizer with byte fallback would
    lose the complete characters beside it.
    """
    ids = _without_incomplete_characters(_byte_tokens(tokenizer), [int(i) for i in token_ids])
    return str(
        tokenizer.decode(
            ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
    )


def completion_text(
    tokenizer: Any, prompt_ids: Ids, completion_ids: Ids, *, skip_special_tokens: bool = True
) -> str:
    """Return what a completion adds to the text of its prompt.

    A character whose first bytes end the prompt belongs to the completion. Only the prompt's last
    tokens are decoded, so the work does not grow with the prompt.

    Args:
        prompt_ids: [P], may be empty.
        completion_ids: [T], may be empty.
        skip_special_tokens: leave special tokens out of the text.
    """
    completion = [int(i) for i in completion_ids]
    if not completion:
        return ""
    context, before = _context(tokenizer, prompt_ids, skip_special_tokens)
    full = decoded(tokenizer, [*context, *completion], skip_special_tokens=skip_special_tokens)
    return _added_text(before, full)


def token_text(tokenizer: Any, token_id: int) -> str:
    """Return the text of one token inside a text, with its leading space if it has one."""
    anchor = _anchor(tokenizer)
    return completion_text(tokenizer, anchor, [token_id], skip_special_tokens=False)


class GrowingText:
    """The text of a completion that grows one token at a time.

    Args:
        prompt_ids: [P] the tokens before the completion.
        skip_special_tokens: leave special tokens out of the text.

    Attributes:
        text: of all tokens so far, without an incomplete last character.
    """

    def __init__(
        self, tokenizer: Any, prompt_ids: Ids, *, skip_special_tokens: bool = True
    ) -> None:
        self.text = ""
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._known, _ = _context(tokenizer, prompt_ids, skip_special_tokens)
        self._held: list[int] = []

    def add(self, token_id: int) -> str:
        """Return what the next token adds to ``text``; nothing while a character is incomplete."""
        self._held.append(int(token_id))
        new = self._new()
        if new.endswith(_INCOMPLETE) and len(self._held) < _HELD:
            return ""
        return self._settle(new)

    def end(self) -> str:
        """Return the rest when no token follows; an incomplete character is U+FFFD."""
        return self._settle(self._new())

    def _new(self) -> str:
        return completion_text(
            self._tokenizer, self._known, self._held, skip_special_tokens=self._skip
        )

    def _settle(self, new: str) -> str:
        self._known += self._held
        self._held = []
        self.text += new
        return new


def token_pieces(tokenizer: Any, prompt_ids: Ids, completion_ids: Ids) -> list[str]:
    """Return what each token adds to the text; the first bytes of a character add nothing.

    Special tokens are shown.
    """
    growing = GrowingText(tokenizer, prompt_ids, skip_special_tokens=False)
    pieces = [growing.add(token_id) for token_id in completion_ids]
    if pieces:
        pieces[-1] += growing.end()
    return pieces


@dataclass(frozen=True)
class StopStrings:
    """The texts that end a completion.

    Attributes:
        texts: none of them empty.
        skip_special_tokens: whether they are searched in the text without special tokens.
    """

    texts: tuple[str, ...]
    skip_special_tokens: bool = True

    def find(self, text: str, start: int = 0) -> tuple[int, int, str] | None:
        """Return (start, end, stop string) of the stop string that ends first, or None.

        Of several that end at the same character, the first of ``texts`` is returned.
        """
        found = [(text.find(stop, start), stop) for stop in self.texts]
        ends = [(at, at + len(stop), stop) for at, stop in found if at >= 0]
        return min(ends, key=lambda match: match[1], default=None)

    def cut(self, text: str) -> tuple[str, bool]:
        """Return the text before its first stop string, and whether there is one."""
        match = self.find(text)
        return (text, False) if match is None else (text[: match[0]], True)


class StopSearch:
    """A search for stop strings in a completion while it is generated."""

    def __init__(self, tokenizer: Any, prompt_ids: Ids, stops: StopStrings) -> None:
        self._text = GrowingText(
            tokenizer, prompt_ids, skip_special_tokens=stops.skip_special_tokens
        )
        self._stops = stops
        self._longest = max(map(len, stops.texts))

    def add(self, token_id: int) -> bool:
        """Return whether the text with this token holds a stop string."""
        new = self._text.add(token_id)
        known = len(self._text.text) - len(new)
        start = max(0, known - self._longest + 1)
        return bool(new) and self._stops.find(self._text.text, start) is not None


def check_round_trip(tokenizer: Any, texts: Iterable[tuple[str, str]]) -> None:
    """Refuse texts that encoding and decoding would change, white space included.

    Texts are equal if they have the same characters in Unicode's canonical form. A space at the
    very start, which SentencePiece may add or drop, and white space around special tokens do not
    count.

    Args:
        texts: (where it stands, text) pairs.

    Raises:
        DatasetError: names the first text that does not come back, and what came instead.
    """
    for where, text in texts:
        back = round_trip_change(tokenizer, text)
        if back is not None:
            raise DatasetError(
                f"{where}: the tokenizer loses text: {difference(text, back)}. The model would "
                "learn what comes back; use the tokenizer that the model was published with, or "
                "change the text"
            )


def round_trip_change(tokenizer: Any, text: str) -> str | None:
    """Return what a text becomes by encoding and decoding, or None if it is unchanged."""
    back = decoded(tokenizer, encoded(tokenizer, text), skip_special_tokens=False)
    if _same(text, back):
        return None
    around = _around_added_tokens(tokenizer, text)
    return None if around and _same(around.sub(r"\1", text), around.sub(r"\1", back)) else back


def difference(text: str, back: str) -> str:
    """Describe two texts around the first character in which they differ."""
    at = _common_prefix_length(text, back)
    first = max(0, at - _SHOWN)
    return (
        f"{text[first : at + _SHOWN]!r} comes back as {back[first : at + _SHOWN]!r} "
        f"(character {at + 1})"
    )


def _same(text: str, back: str) -> bool:
    text, back = (unicodedata.normalize("NFC", one) for one in (text, back))
    return text == back or text.removeprefix(" ") == back.removeprefix(" ")


def _around_added_tokens(tokenizer: Any, text: str) -> re.Pattern[str] | None:
    """Return a pattern of a text's added tokens with the white space around them, or None."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    known = {str(token) for token in added.values()}
    inside = [re.escape(token) for token in known if token.strip() and token in text]
    return re.compile(rf"\s*({'|'.join(inside)})\s*") if inside else None


def _context(tokenizer: Any, prompt_ids: Ids, skip_special_tokens: bool) -> tuple[list[int], str]:
    """Return the last tokens of a prompt that have a text, and that text; all if none have."""
    size = _CONTEXT
    while True:
        context = [int(i) for i in prompt_ids[-size:]]
        text = decoded(tokenizer, context, skip_special_tokens=skip_special_tokens)
        if text or size >= len(prompt_ids):
            return context, text
        size *= 4


def _added_text(before: str, full: str) -> str:
    """Return ``full`` without ``before``, whose incomplete last characters may be complete now."""
    start = before
    while not full.startswith(start) and start.endswith(_INCOMPLETE):
        start = start[:-1]
    if full.startswith(start):
        return full[len(start) :]
    return full[_common_prefix_length(before, full) :]


def _common_prefix_length(a: str, b: str) -> int:
    """Return the length of the common prefix of two texts."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((at for at, (x, y) in pairs if x != y), min(len(a), len(b)))


@functools.lru_cache(maxsize=16)
def _anchor(tokenizer: Any) -> tuple[int, ...]:
    """Return the tokens of a text that neither begins nor ends with a space."""
    return tuple(encoded(tokenizer, "a"))


@functools.lru_cache(maxsize=16)
def _byte_tokens(tokenizer: Any) -> dict[int, int]:
    """Return {token id: byte} of a tokenizer with byte fallback, {} for others."""
    names = [f"<0x{byte:02X}>" for byte in range(256)]
    vocabulary = tokenizer.get_vocab()
    if any(name not in vocabulary for name in names):
        return {}
    ids = [int(vocabulary[name]) for name in names]
    if tokenizer.decode(ids[0x41:0x43]) != "AB":  # tokens that only have such names
        return {}
    return {token_id: byte for byte, token_id in enumerate(ids)}


def _without_incomplete_characters(byte_tokens: dict[int, int], ids: list[int]) -> list[int]:
    """Replace the byte tokens of each incomplete character by those of U+FFFD.

    Decoders with byte fallback decode a run of byte tokens as a whole, and drop it where one byte
    does not fit.
    """
    if byte_tokens.keys().isdisjoint(ids):
        return ids
    tokens = {byte: token_id for token_id, byte in byte_tokens.items()}
    replaced: list[int] = []
    run = bytearray()
    for token_id in [*ids, -1]:
        if token_id in byte_tokens:
            run.append(byte_tokens[token_id])
            continue
        replaced += [tokens[byte] for byte in run.decode(errors="replace").encode()]
        run.clear()
        replaced.append(token_id)
    return replaced[:-1]

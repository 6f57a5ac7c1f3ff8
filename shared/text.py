"""Token ids -> text, with what stands in front of them.

The text of a part is not always the part of the text: a SentencePiece tokenizer drops the first
space of whatever it decodes, and a character may be cut between two tokens. So the text of a
completion is what the completion adds to the end of its prompt.

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
_HALF = "\ufffd"  # what a decoder gives for half a character
_SHOWN = 24  # characters of a text on either side of a difference


def encoded(tokenizer: Any, text: str) -> list[int]:
    """Return the ids of a text alone, without special tokens around it."""
    return [int(i) for i in tokenizer(text, add_special_tokens=False)["input_ids"]]


def decoded(tokenizer: Any, token_ids: Ids, *, skip_special_tokens: bool = True) -> str:
    """Return the text of ids alone, white space as it is.

    Each half character is one U+FFFD, also where a tokenizer with byte fallback would give up the
    whole characters beside it.
    """
    ids = _mended(_byte_tokens(tokenizer), [int(i) for i in token_ids])
    return str(
        tokenizer.decode(
            ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
    )


def completion_text(
    tokenizer: Any, prompt_ids: Ids, completion_ids: Ids, *, skip_special_tokens: bool = True
) -> str:
    """Return what a completion adds to the text of its prompt.

    A character whose first bytes end the prompt counts to the completion that ends it. The work
    does not grow with the prompt: its last tokens are enough.

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
    return _without(before, full)


def token_text(tokenizer: Any, token_id: int) -> str:
    """Return the text of one token inside a text: its leading space, if it has one, included."""
    anchor = _anchor(tokenizer)
    return completion_text(tokenizer, anchor, [token_id], skip_special_tokens=False)


class GrowingText:
    """The text of a completion that grows by a token at a time.

    Args:
        prompt_ids: [P] the tokens before the completion.
        skip_special_tokens: leave special tokens out of the text.

    Attributes:
        text: of all tokens so far, less a last character that is not whole yet.
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
        """Return what the next token adds to ``text``; nothing while a character is not whole."""
        self._held.append(int(token_id))
        new = self._new()
        if new.endswith(_HALF) and len(self._held) < _HELD:
            return ""
        return self._settle(new)

    def end(self) -> str:
        """Return what is still to come when no token follows: half a character is U+FFFD."""
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
    """Return what each token adds to the text; that of a character's first bytes is empty.

    Special tokens are shown.
    """
    growing = GrowingText(tokenizer, prompt_ids, skip_special_tokens=False)
    pieces = [growing.add(token_id) for token_id in completion_ids]
    if pieces:
        pieces[-1] += growing.end()
    return pieces


@dataclass(frozen=True)
class StopStrings:
    """Texts that end a completion.

    Attributes:
        texts: none of them empty.
        skip_special_tokens: whether they are looked for in the text without special tokens.
    """

    texts: tuple[str, ...]
    skip_special_tokens: bool = True

    def find(self, text: str, start: int = 0) -> tuple[int, int, str] | None:
        """Return (first character, end, stop string) of the one that ends first, or None.

        Of those that end at the same character the first of ``texts`` is meant.
        """
        found = [(text.find(stop, start), stop) for stop in self.texts]
        ends = [(at, at + len(stop), stop) for at, stop in found if at >= 0]
        return min(ends, key=lambda match: match[1], default=None)

    def cut(self, text: str) -> tuple[str, bool]:
        """Return the text before its first stop string, and whether there is one."""
        match = self.find(text)
        return (text, False) if match is None else (text[: match[0]], True)


class StopSearch:
    """Looks for stop strings in a completion while it is generated."""

    def __init__(self, tokenizer: Any, prompt_ids: Ids, stops: StopStrings) -> None:
        self._text = GrowingText(
            tokenizer, prompt_ids, skip_special_tokens=stops.skip_special_tokens
        )
        self._stops = stops
        self._longest = max(map(len, stops.texts))

    def add(self, token_id: int) -> bool:
        """Return whether the text holds a stop string with this token."""
        new = self._text.add(token_id)
        known = len(self._text.text) - len(new)
        start = max(0, known - self._longest + 1)
        return bool(new) and self._stops.find(self._text.text, start) is not None


def check_round_trip(tokenizer: Any, texts: Iterable[tuple[str, str]]) -> None:
    """Refuse texts that encoding and decoding would change, white space included.

    Equal are texts of the same characters in Unicode's canonical form. A space at the very start,
    which SentencePiece may add or drop, and white space around special tokens do not count.

    Args:
        texts: (where it stands, text) pairs.

    Raises:
        DatasetError: names the first text that does not come back, and what came instead.
    """
    for where, text in texts:
        back = lost(tokenizer, text)
        if back is not None:
            raise DatasetError(
                f"{where}: the tokenizer loses text: {difference(text, back)}. The model would "
                "learn what comes back; use the tokenizer that the model was published with, or "
                "change the text"
            )


def lost(tokenizer: Any, text: str) -> str | None:
    """Return what comes back of a text, or None where it comes back whole; see above."""
    back = decoded(tokenizer, encoded(tokenizer, text), skip_special_tokens=False)
    if _same(text, back):
        return None
    around = _around_added_tokens(tokenizer, text)
    return None if around and _same(around.sub(r"\1", text), around.sub(r"\1", back)) else back


def difference(text: str, back: str) -> str:
    """Return both texts around the first character in which they differ."""
    at = _alike(text, back)
    first = max(0, at - _SHOWN)
    return (
        f"{text[first : at + _SHOWN]!r} comes back as {back[first : at + _SHOWN]!r} "
        f"(character {at + 1})"
    )


def _same(text: str, back: str) -> bool:
    text, back = (unicodedata.normalize("NFC", one) for one in (text, back))
    return text == back or text.removeprefix(" ") == back.removeprefix(" ")


def _around_added_tokens(tokenizer: Any, text: str) -> re.Pattern[str] | None:
    """What finds added tokens in a text with the white space around them."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    known = {str(token) for token in added.values()}
    inside = [re.escape(token) for token in known if token.strip() and token in text]
    return re.compile(rf"\s*({'|'.join(inside)})\s*") if inside else None


def _context(tokenizer: Any, prompt_ids: Ids, skip_special_tokens: bool) -> tuple[list[int], str]:
    """Last tokens of a prompt that have a text, and that text; all if none have."""
    size = _CONTEXT
    while True:
        context = [int(i) for i in prompt_ids[-size:]]
        text = decoded(tokenizer, context, skip_special_tokens=skip_special_tokens)
        if text or size >= len(prompt_ids):
            return context, text
        size *= 4


def _without(before: str, full: str) -> str:
    """``full`` less ``before``, whose last half characters may have become whole."""
    start = before
    while not full.startswith(start) and start.endswith(_HALF):
        start = start[:-1]
    if full.startswith(start):
        return full[len(start) :]
    return full[_alike(before, full) :]


def _alike(a: str, b: str) -> int:
    """Number of characters that two texts begin with alike."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((at for at, (x, y) in pairs if x != y), min(len(a), len(b)))


@functools.lru_cache(maxsize=16)
def _anchor(tokenizer: Any) -> tuple[int, ...]:
    """Tokens of a text that neither begins nor ends with a space."""
    return tuple(encoded(tokenizer, "a"))


@functools.lru_cache(maxsize=16)
def _byte_tokens(tokenizer: Any) -> dict[int, int]:
    """{token id: byte} of a tokenizer with byte fallback; empty for others."""
    names = [f"<0x{byte:02X}>" for byte in range(256)]
    vocabulary = tokenizer.get_vocab()
    if any(name not in vocabulary for name in names):
        return {}
    ids = [int(vocabulary[name]) for name in names]
    if tokenizer.decode(ids[0x41:0x43]) != "AB":  # they are no more than names
        return {}
    return {token_id: byte for byte, token_id in enumerate(ids)}


def _mended(byte_tokens: dict[int, int], ids: list[int]) -> list[int]:
    """Ids with the bytes of U+FFFD in place of each half character, for decoders of byte fallback.

    They decode a run of byte tokens as one, and none of it where one byte does not fit.
    """
    if byte_tokens.keys().isdisjoint(ids):
        return ids
    tokens = {byte: token_id for token_id, byte in byte_tokens.items()}
    mended: list[int] = []
    run = bytearray()
    for token_id in [*ids, -1]:
        if token_id in byte_tokens:
            run.append(byte_tokens[token_id])
            continue
        mended += [tokens[byte] for byte in run.decode(errors="replace").encode()]
        run.clear()
        mended.append(token_id)
    return mended[:-1]

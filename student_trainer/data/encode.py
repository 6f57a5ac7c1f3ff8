"""The tokenization of prompts and completions, with the ids that the joined text would have.

Two things go wrong when parts are tokenized alone. A SentencePiece tokenizer puts a space before
every text, so a completion tokenized by itself begins with one that nobody wrote. And text that
looks like a control token (`<|im_end|>` in a tutorial about templates) becomes that token.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from shared.errors import DatasetError

# A placeholder must survive what templates do to text: trimming, JSON, splitting at tags.
_PLACEHOLDER = "Qz7Literal{}zQ"
_PLACEHOLDERS = re.compile(r"Qz7Literal(\d+)zQ")
# A tokenizer that prepends a space puts it before the anchor, not before the text that follows.
_ANCHORS = ("\n", "a", ".")


@dataclass(frozen=True)
class Encoder:
    """A tokenizer that keeps control tokens apart from text that only looks like them.

    Attributes:
        stop_ids: tokens that end a completion.
        literals: strings in rows that look like control tokens, in the order of their placeholders.
    """

    tokenizer: PreTrainedTokenizerBase
    stop_ids: Sequence[int] = ()
    literals: list[str] = field(default_factory=list)

    @cached_property
    def control_tokens(self) -> frozenset[str]:
        """The tokens that only a template may write.

        These are special tokens, tokens that end a completion, and `<|…|>` that the template names.
        """
        template = str(self.tokenizer.chat_template or "")
        return frozenset(
            token.content
            for number, token in self.tokenizer.added_tokens_decoder.items()
            if token.special
            or number in self.stop_ids
            or (token.content.startswith(("<|", "<｜")) and token.content in template)
        )

    @cached_property
    def _control(self) -> re.Pattern[str]:
        longest_first = sorted(self.control_tokens, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def find_control_token(self, text: str) -> str | None:
        """Return the first control token in ``text``, or None."""
        found = self._control.search(text)
        return found[0] if found else None

    def protect(self, value: Any) -> Any:
        """Return ``value`` with placeholders in place of text that looks like a control token.

        Args:
            value: text, or lists and dicts of it at any depth.
        """
        if isinstance(value, str):
            return self._control.sub(self._placeholder, value)
        if isinstance(value, Mapping):
            return {key: self.protect(inner) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [self.protect(inner) for inner in value]
        return value

    def _placeholder(self, found: re.Match[str]) -> str:
        if found[0] not in self.literals:
            self.literals.append(found[0])
        return _PLACEHOLDER.format(self.literals.index(found[0]))

    def restore(self, text: str) -> str:
        """Return ``text`` with its placeholders replaced by the original text."""
        return _PLACEHOLDERS.sub(lambda found: self.literals[int(found[1])], text)

    @cached_property
    def leading_ids(self) -> list[int]:
        """The special tokens that the tokenizer puts before a text: its BOS, or none."""
        bare = list(self.tokenizer("a", add_special_tokens=False)["input_ids"])
        whole = list(self.tokenizer("a", add_special_tokens=True)["input_ids"])
        starts = (n for n in range(len(whole)) if whole[n : n + len(bare)] == bare)
        return whole[: next(starts, 0)]

    def encode_prompt(self, text: str) -> list[int]:
        """Return the ids of a text that begins a sequence, with exactly one BOS if there is one.

        Tokens that the tokenizer appends to a text are left out, because a completion follows.
        """
        bos = self.tokenizer.bos_token
        if bos and text.startswith(bos):
            return self.encode(text)
        return [*self.leading_ids, *self.encode(text)]

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text; control tokens become tokens, placeholders plain text.

        Raises:
            DatasetError: the tokenizer cannot encode a placeholder's text as plain text.
        """
        literal = _PLACEHOLDERS.search(text)
        if literal is None:
            return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        ids: list[int] = []
        start = 0
        for found in [*self._control.finditer(text), None]:
            piece = text[start : found.start() if found else len(text)]
            if piece:
                ids += self._encode_literally(self.restore(piece))
            if found:
                ids.append(int(self.tokenizer.convert_tokens_to_ids(found[0])))
                start = found.end()
        # SentencePiece encodes a space as this character, so the two cannot be told apart.
        if self._decode(ids).replace("▁", " ") != self.restore(text).replace("▁", " "):
            raise DatasetError(
                f"the text {self.restore(literal[0])!r} looks like a control token, and this "
                "tokenizer cannot write it as text; take it out of the row"
            )
        return ids

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    def _encode_literally(self, text: str) -> list[int]:
        """Return the ids of an original text, split so that none of them is a control token."""
        ids = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        if not self._control_ids.intersection(ids):
            return list(ids)
        # `split_special_tokens` does not split control tokens that are not marked as special, so
        # the text is cut within each of them.
        ids, start = [], 0
        for found in self._control.finditer(text):
            ids += self.tokenizer(text[start : found.start() + 1], add_special_tokens=False)[
                "input_ids"
            ]
            start = found.start() + 1
        return [*ids, *self.tokenizer(text[start:], add_special_tokens=False)["input_ids"]]

    @cached_property
    def _control_ids(self) -> frozenset[int]:
        return frozenset(
            int(self.tokenizer.convert_tokens_to_ids(token)) for token in self.control_tokens
        )

    def encode_after(self, prefix: str, prefix_ids: Sequence[int], text: str) -> list[int]:
        """Return the ids of ``text`` after ``prefix``, whose ids are given.

        These are the ids that ``prefix + text`` has there. Where one token spans both, they are ids
        of ``text`` alone that decode to it after the prefix.

        Raises:
            DatasetError: there are no such ids.
        """
        whole = self.encode(prefix + text)
        for leading in ([], self.leading_ids):  # the prefix's ids may have a BOS, its text has none
            if [*leading, *whole][: len(prefix_ids)] == list(prefix_ids):
                return [*leading, *whole][len(prefix_ids) :]
        wanted = self.restore(text)
        for anchor in ("", *_ANCHORS):
            begin = self.encode(anchor) if anchor else []
            ids = self.encode(anchor + text)
            if ids[: len(begin)] == begin and self._adds(prefix_ids, ids[len(begin) :], wanted):
                return ids[len(begin) :]
        raise DatasetError(
            f"the tokenizer cannot write {wanted[:40]!r} after {self.restore(prefix)[-40:]!r}: "
            "their tokens do not give the text back"
        )

    def _adds(self, prefix_ids: Sequence[int], ids: Sequence[int], text: str) -> bool:
        """Return whether ``ids`` decode to ``text`` after the last of ``prefix_ids``."""
        before = list(prefix_ids[-16:])
        return self._decode([*before, *ids]) == self._decode(before) + text

r"""Read the number that an answer to a word problem gives.

The first rule that finds a number decides:

1. ``####`` with a number behind it, the first one: GSM8K's own rule.
2. The last ``\boxed{…}`` that is closed and holds a number.
3. The last "the answer is", "final answer:" or "answer:" with a number in its line.
4. The last number of the text; not in a text that was cut by the length limit.

Numbers are exact fractions. A percent sign, a currency, a unit or an ordinal's ending is left out:
"50%", "$50" and "50kg" are 50. Digits within a word ("3D", "B12", "GPT-4"), dates, times of day and
powers are no numbers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

from student_trainer.evaluation.extract import after_thoughts

_DIGITS = 300  # most digits of a number
_BOXES = 50  # most boxes that are read, from the end
_LINE = 1000  # most characters of a line or a box that are read
_SPACE = "\u2009"  # a thin space, between groups of digits
_CHARACTERS = {
    **dict.fromkeys(map(ord, "\u2212\ufe63\uff0d\u2010\u2011"), "-"),
    **dict.fromkeys(map(ord, "\u00a0\u2007\u2008\u202f"), _SPACE),
    **{0xFF10 + digit: str(digit) for digit in range(10)},
    ord("\u2044"): "/",
    ord("\ufeff"): None,
    ord("\u200b"): None,
    **{
        ord(sign): f" {above}/{below} "
        for sign, above, below in (
            ("½", 1, 2), ("⅓", 1, 3), ("⅔", 2, 3), ("¼", 1, 4), ("¾", 3, 4), ("⅕", 1, 5),
            ("⅖", 2, 5), ("⅗", 3, 5), ("⅘", 4, 5), ("⅙", 1, 6), ("⅚", 5, 6), ("⅛", 1, 8),
            ("⅜", 3, 8), ("⅝", 5, 8), ("⅞", 7, 8),
        )
    },
}  # fmt: skip
_LATEX = (
    (re.compile(r"\\[dt]?frac\s*\{\s*(-?)([\d.,]+)\s*\}\s*\{\s*([\d.,]+)\s*\}"), r" \1\2/\3 "),
    (re.compile(r"\\[dt]?frac\s*(\d)\s*(\d)"), r" \1/\2 "),
    (re.compile(r"(?<=\d)\{,\}(?=\d)"), ","),
    (re.compile(r"(?<=\d)(?:\\[,;:! ]|~)(?=\d{3})"), _SPACE),
    (re.compile(r"\\(?:text|textbf|mathrm|mathbf|textit|operatorname)\s*\{([^{}]*)\}"), r" \1 "),
    (re.compile(r"\\(?:times|cdot)(?![a-zA-Z])"), "×"),
    (re.compile(r"\\(?:left|right|displaystyle)(?![a-zA-Z])"), ""),
    (re.compile(r"\\([$%&#])"), r"\1"),
    (re.compile(r"\\[,;:! ()\[\]]"), " "),
    (re.compile(r"(?<!\d)\*\*|\*\*(?!\d)|__"), ""),
    (re.compile(r"(?<=\s-) (?=\d+/\d+ )"), ""),
    (re.compile(r"(?<=\d)[ \u2009]+(?=\d+/\d)"), " "),
)
_UNITS = (
    r"(?:st|nd|rd|th|k[gmWw]|[gms]|mg|[cm]m|ft|in|lbs?|oz|[lL]|m[lL]|hrs?|h|mins?|secs?|ms|mph|"
    r"k?cal|[cC]|[fF]|USD|EUR|GBP|km/h|[mcd]?[lL]|cents?|dollars?|hours?|minutes?|days?|years?)"
)
_NUMBER = re.compile(
    r"(?<![\w^:])(?<![A-Za-z]-)(?<!\d[./])(?<![./]\d)"
    r"(?P<sign>(?<![\w)])-(?:[ ]?(?=[$€£]))?)?[$€£¥₹]?(?P<sign2>(?<=[$€£¥₹])-)?[ ]?"
    r"(?P<whole>\d{1,3}(?:,\d{3}){1,9}(?!\d)|\d{1,3}(?:[ \u2009]\d{3}){1,9}(?![\d/,]|[ ]\d)|\d+)?"
    r"(?P<part>\.\d+|(?<=\d)\.(?!\d))?"
    r"(?:(?:[eE]|[ ]?[×x*][ ]?10\^)\{?(?P<power>[-+]?\d{1,3})\}?(?!\d))?"
    r"(?:[ ]?/[ ]?(?P<below>\d+)(?![\d/])(?!\.\d)|[ ](?P<above2>\d+)/(?P<below2>\d+)(?![\d/]))?"
    rf"(?P<end>(?![\w^]|:\d|[-/.]\d+[-/.]\d|/\d)|(?={_UNITS}(?![\w])))"
)
_MARK = re.compile(r"####[ \t]*(?=[-$€£¥₹.\d])")
_HEADING = re.compile(r"\d+[.)][ \t]+[A-Za-z*]")
_ANSWER = re.compile(
    r"\b(?:final\s+answer|answer|result)\b[^\n:=.\d]{0,60}?(?:\bis\b|:|=)", re.IGNORECASE
)
_TIME = re.compile(
    r"\d{1,2}(?::\d\d)+|\d{1,2}\s?[ap]\.?m\b\.?|\d{1,4}([-/.])\d{1,2}\1\d{1,4}", re.I
)


@dataclass(frozen=True)
class Number:
    """A number, and with how many decimals it was written."""

    value: Fraction
    decimals: int = 0

    def __str__(self) -> str:
        value = self.value
        return str(value) if value.denominator == 1 or not self.decimals else f"{float(value):g}"


def final_number(text: str, *, truncated: bool = False) -> Number | None:
    """Return the number that an answer ends with, or None.

    Args:
        text: the answer.
        truncated: it was cut by the length limit. Then only a marked number counts, and only when
            something follows it, so that no digit can be missing.
    """
    text = _plain(after_thoughts(text, truncated))
    for match in _MARK.finditer(text):
        if not _HEADING.match(text, match.end()):
            found = next(_numbers(text[match.end() : match.end() + _LINE]), None)
            if found is not None and found[1] == 0:
                complete = match.end() + found[2] < len(text)
                return found[0] if complete or not truncated else None
    for content in _boxes(text):
        number = _stated(content)
        if number is not None:
            return number
    for match in reversed(list(_ANSWER.finditer(text))):
        line = text[match.end() : match.end() + _LINE].lstrip(" *\n\t").split("\n")[0]
        if truncated and text.endswith(line) and not line.endswith((".", "!")):
            line = line[: max(line.rfind(" "), 0)]  # the last word may be cut
        number = _stated(re.split(r"[.!?](?=\s)", line)[0])
        if number is not None:
            return number
    if truncated:
        return None
    every = [number for number, _, _ in _numbers(text)]
    return every[-1] if every else None


def equal_numbers(found: Number, reference: Number) -> bool:
    """Return whether an answer is the reference's number.

    Integers and fractions are compared exactly. A reference with decimals is met by whatever
    rounds to it: 0.333 and 1/3 are 0.33, and 0.3 is not.
    """
    if found.value == reference.value:
        return True
    if not reference.decimals or (found.decimals and found.decimals < reference.decimals):
        return False
    return abs(found.value - reference.value) * 2 * 10**reference.decimals <= 1 and (
        found.value.denominator != 1
    )


def _plain(text: str) -> str:
    """Return the text with LaTeX and Unicode forms of numbers as plain ones."""
    text = text.translate(_CHARACTERS)
    for pattern, replacement in _LATEX:
        text = pattern.sub(replacement, text)
    return text


def _stated(text: str) -> Number | None:
    """Return the first number of the last part between "=" that has one, or None."""
    for part in reversed(text.split("=")):
        found = next(_numbers(part), None)
        if found is not None:
            return found[0]
    return None


def _boxes(text: str) -> list[str]:
    """Return the contents of closed boxes, the last one first."""
    found = []
    for match in list(re.finditer(r"\\(?:boxed|fbox)\s*\{", text))[-_BOXES:]:
        depth = 1
        for at in range(match.end(), min(len(text), match.end() + _LINE)):
            depth += {"{": 1, "}": -1}.get(text[at], 0)
            if depth == 0:
                found.append(text[match.end() : at])
                break
    return found[::-1]


def _numbers(text: str) -> Iterator[tuple[Number, int, int]]:
    """Yield all numbers of a plain text, each with its start and end."""
    excluded = [match.span() for match in _TIME.finditer(text)]
    current = 0
    for match in _NUMBER.finditer(text):
        while current < len(excluded) and excluded[current][1] <= match.start("sign"):
            current += 1
        if not (match["whole"] or match["part"]) or match["part"] == "." == match[0].strip():
            continue
        begin = match.start("whole") if match["whole"] else match.start("part")
        if any(start <= begin < end for start, end in excluded):
            continue
        number = _value(match)
        if number is not None:
            yield number, match.start(), match.end()


def _value(match: re.Match[str]) -> Number | None:
    whole = re.sub(r"[, \u2009]", "", match["whole"] or "0")
    part = (match["part"] or ".")[1:]
    below = match["below"] or match["below2"]
    if max(len(whole), len(part), len(below or ""), len(match["above2"] or "")) > _DIGITS:
        return None
    value = Fraction(f"{whole}.{part or '0'}") * Fraction(10) ** int(match["power"] or 0)
    if below is not None:
        if int(below) == 0:
            return None
        if match["above2"] is not None:
            value += Fraction(int(match["above2"]), int(below))
        else:
            value /= int(below)
    negative = match["sign"] or match["sign2"]
    decimals = len(part) if below is None and not match["power"] else 0
    return Number(-value if negative else value, decimals)

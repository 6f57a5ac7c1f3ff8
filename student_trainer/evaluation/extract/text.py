"""The text of an answer: what is no thought, in the ways in which it may be meant."""

from __future__ import annotations

import html
import re

_THOUGHTS = (
    *(
        (rf"<{name}>", rf"</{name}>")
        for name in ("think", "thinking", "thought", "thoughts", "reasoning", "seed:think")
    ),
    (r"\[THINK\]", r"\[/THINK\]"),
    (r"◁think▷", r"◁/think▷"),
    (r"<\|begin_of_thought\|>", r"<\|end_of_thought\|>"),
    (r"<\|channel\|>analysis<\|message\|>", r"<\|channel\|>final<\|message\|>"),
    (r"\Aanalysis(?=[A-Z\s])", r"assistantfinal"),
)
_UNQUOTED = r"(?<![\"'`]){}(?![\"'`])"  # a tag in quotes is mentioned, not meant
_END = re.compile(
    _UNQUOTED.format(r"(?:<\|(?:endoftext|im_end|eot_id|end_of_text|end)\|>|<end_of_turn>)")
)
_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_TYPOGRAPHY = {
    **dict.fromkeys(map(ord, "\ufeff\u200b\u200c\u200d\u2060\u00ad\x00"), None),
    **dict.fromkeys(map(ord, "\u00a0\u2002\u2003\u2009\u202f\u3000"), " "),
    **dict.fromkeys(map(ord, "“”„‟″"), '"'),
    **dict.fromkeys(map(ord, "‘’‚‛′"), "'"),
}
_TAGS = re.compile(
    r"^[ \t]*(?:</?(?:pre|code|answer|solution|python)\b[^>\n]{0,80}>|\[/?PYTHON\])+"
    r"|(?:</(?:pre|code|answer|solution|python)>|\[/PYTHON\])+[ \t]*$",
    re.MULTILINE | re.IGNORECASE,
)
_ENTITY = re.compile(r"&(?:lt|gt|amp|quot|#39|#x27);")


def readings(completion: str, truncated: bool) -> list[str]:
    """Return the answer as it is, and with typography or tags repaired where that changes it."""
    text = after_thoughts(normalized(completion), truncated)
    if _ENTITY.search(text) and "<" not in text and ">" not in text:
        text = html.unescape(text)
    variants = [text]
    for changed in (text.translate(_TYPOGRAPHY), _TAGS.sub("\n```\n", text)):
        if changed not in variants:
            variants.append(changed)
    return variants


def normalized(text: str) -> str:
    text = text.encode("utf-8", "replace").decode()
    text = _ANSI.sub("", text).replace("\r\n", "\n").replace("\r", "\n")
    return text.lstrip("\ufeff")


def after_thoughts(text: str, truncated: bool) -> str:
    """Return the text after the thoughts and before a model's end token."""
    for opening, closing in _THOUGHTS:
        ends = [m.end() for m in re.finditer(_UNQUOTED.format(closing), text)]
        if ends:
            text = text[ends[-1] :]
        opened = re.search(_UNQUOTED.format(f"(?:{opening})"), text)
        if opened and truncated:
            text = text[: opened.start()]
        elif opened:
            # The model ended by itself without the closing tag.
            text = text[: opened.start()] + "\n" + text[opened.end() :]
    end = _END.search(text)
    return text[: end.start()] if end else text


def indentation(line: str) -> str:
    return line[: len(line) - len(line.lstrip(" \t"))]

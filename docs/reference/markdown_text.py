"""The escaping of plain text for Markdown."""

from __future__ import annotations

import re

_CODE = re.compile(r"(`+[^`]*`+)")


def escaped(text: str) -> str:
    """Return text in which Markdown and HTML see no markup but `code`."""
    parts = _CODE.split(text)
    parts[::2] = [re.sub(r"([*_\[\]|])", r"\\\1", p).replace("<", "&lt;") for p in parts[::2]]
    return "".join(parts)

"""Plain text as Markdown."""

from __future__ import annotations

import re

_CODE = re.compile(r"(`+[^`]*`+)")


def escaped(text: str) -> str:
    """Text that holds no markup but `code`, so that Markdown and HTML leave the rest as it is."""
    parts = _CODE.split(text)
    parts[::2] = [re.sub(r"([*_\[\]|])", r"\\\1", p).replace("<", "&lt;") for p in parts[::2]]
    return "".join(parts)

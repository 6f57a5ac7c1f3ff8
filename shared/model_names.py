"""Tell the name of a local folder or file from an id on the Hugging Face Hub."""

from __future__ import annotations

import re
from pathlib import Path

# What the Hub allows: one name, or an owner and a name.
_HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)?", re.ASCII)
_MOST_CHARACTERS = 96
# Names that the Hub gives to no owner, and that folders have.
_NO_OWNERS = ("models", "datasets", "spaces", "runs", "outputs", "checkpoints")


def looks_local(name: str) -> bool:
    """Return whether a name cannot be a Hub id, or begins with a folder that is here."""
    if len(name) > _MOST_CHARACTERS or not _HUB_ID.fullmatch(name):
        return True
    first, _, rest = name.partition("/")
    return bool(rest) and (first in _NO_OWNERS or Path(first).is_dir())


def describe_missing(name: str, *, owner: bool = False) -> str:
    """Return "folder … does not exist" for a local folder that is not there, else an empty text.

    Args:
        owner: a name without an owner is no Hub id.
    """
    if Path(name).expanduser().exists() or not (looks_local(name) or (owner and "/" not in name)):
        return ""
    return f"folder {name} does not exist"

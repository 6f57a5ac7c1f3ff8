"""Tell the name of a local folder or file from an id on the Hugging Face Hub, and find it."""

from __future__ import annotations

import re
from pathlib import Path

# What the Hub allows: one name, or an owner and a name.
_HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)?", re.ASCII)
_MOST_CHARACTERS = 96
# Names that the Hub gives to no owner, and that folders have.
_NO_OWNERS = ("models", "datasets", "spaces", "runs", "outputs", "checkpoints")


def existing(name: str | Path) -> Path | None:
    """Return the path of a name, with ``~`` expanded; None where nothing is there.

    It is None also for names that the system refuses, where pathlib raises: too long ones, those of
    an unknown user's home, and those in folders without the right to look.
    """
    try:
        path = Path(name).expanduser()
        return path if path.exists() else None
    except (OSError, RuntimeError):
        return None


def looks_local(name: str) -> bool:
    """Return whether a name cannot be a Hub id, or begins with a folder that is here."""
    if len(name) > _MOST_CHARACTERS or not _HUB_ID.fullmatch(name):
        return True
    first, _, rest = name.partition("/")
    folder = existing(first)
    return bool(rest) and (first in _NO_OWNERS or (folder is not None and folder.is_dir()))


def describe_missing(name: str, *, owner: bool = False) -> str:
    """Return "folder … does not exist" for a local folder that is not there, else an empty text.

    Args:
        owner: a name without an owner is no Hub id.
    """
    if existing(name) is not None or not (looks_local(name) or (owner and "/" not in name)):
        return ""
    return f"folder {name} does not exist"

"""Tell the name of a local folder or file from an id on the Hugging Face Hub, and find it."""

from __future__ import annotations

import re
from itertools import islice
from pathlib import Path

from shared.nearest import nearest

# What the Hub allows: one name, or an owner and a name.
_HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)?", re.ASCII)
_MOST_CHARACTERS = 96
_MOST_COMPARED = 1000  # names of a folder
_MOST_NAMED = 3
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
    return f"folder {name} does not exist{near_path(name)}"


def near_path(name: str) -> str:
    """Return " (did you mean …?)" for a path that is not there, if one beside it has a like name.

    The last part of the path that is missing is compared with what its folder holds.
    """
    try:
        path = Path(name).expanduser()
        missing = path
        while not missing.parent.exists():
            missing = missing.parent
        beside = {each.name: each for each in islice(missing.parent.iterdir(), _MOST_COMPARED)}
        near = nearest(missing.name, beside)
    except (OSError, RuntimeError):
        return ""
    if near is None or missing.exists():
        return ""
    meant = beside[near] / path.relative_to(missing)
    shown = f"./{meant}" if name.startswith("./") else str(meant)
    return f" (did you mean {shown}?)" if meant.exists() else ""


def models_below(folder: Path) -> str:
    """Return " (did you mean …?)" for a folder without a model that holds folders with one."""
    try:
        below = [
            path
            for path in sorted(islice(folder.iterdir(), _MOST_COMPARED))
            if any((path / file).exists() for file in ("config.json", "adapter_config.json"))
        ]
    except OSError:
        return ""
    if not below:
        return ""
    *others, last = map(str, below[-_MOST_NAMED:])
    return f" (did you mean {', '.join(others)}{' or ' if others else ''}{last}?)"

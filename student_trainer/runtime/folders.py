"""Check, before anything loads, that what a command writes has a place to be written to."""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryDirectory

from shared.errors import ConfigurationError
from shared.model_names import existing


def check_output_folder(flag: str, folder: str | Path | None) -> None:
    """Check that a folder could be made and written to; nothing is left there.

    Args:
        flag: that names it, for the message, such as ``--output_dir``.

    Raises:
        ConfigurationError: it could not.
    """
    path = Path(folder or "")
    nearest = next(each for each in (path, *path.absolute().parents) if existing(each))
    if not nearest.is_dir() or not _takes_files(nearest):
        raise ConfigurationError(
            f"{flag} {path}: {nearest} is no folder that can be written to; give another"
        )


def check_output_file(flag: str, file: Path) -> None:
    """Check that a file could be written, in a folder that is there; nothing is left there.

    Raises:
        ConfigurationError: it could not.
    """
    found = existing(file)
    if found is None:
        if not existing(file.absolute().parent):
            raise ConfigurationError(
                f"{flag} {file}: there is no folder {file.parent}; make it, or give another"
            )
        check_output_folder(flag, file.absolute().parent)
    elif found.is_dir() or not os.access(found, os.W_OK):
        raise ConfigurationError(f"{flag} {file} is no file that can be written to; give another")


def _takes_files(folder: Path) -> bool:
    """Return whether a folder can be made in this one; root has rights that /proc does not obey."""
    try:
        if os.access(folder, os.W_OK | os.X_OK):
            with TemporaryDirectory(dir=folder):
                return True
    except OSError:
        pass
    return False

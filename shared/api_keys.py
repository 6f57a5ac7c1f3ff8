"""Read files of API keys."""

from __future__ import annotations

from pathlib import Path

from shared.errors import ConfigurationError


def read_keys(path: str, flag: str) -> list[str]:
    """Return the keys of a file, one a line, without empty lines and ``#`` comments.

    Raises:
        ConfigurationError: the file is unreadable, holds no key, or has a malformed line. The
            message never shows a key.
    """
    try:
        text = Path(path).read_text(errors="replace")
    except OSError as error:
        raise ConfigurationError(f"{flag} {path}: {error.strerror or error}") from error
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1)]
    keys = [(number, line) for number, line in lines if line and not line.startswith("#")]
    if not keys:
        raise ConfigurationError(
            f"{flag} {path} holds no key; make one with `openssl rand -hex 32`"
        )
    return [check_key(key, f"{flag} {path}, line {number}") for number, key in keys]


def check_key(key: str, where: str) -> str:
    """Return the key if an HTTP header can carry it.

    Raises:
        ConfigurationError: it cannot. The message says where the key stands, and never shows it.
    """
    if key and key.isascii() and key.isprintable() and " " not in key:
        return key
    raise ConfigurationError(
        f"{where}: a key is visible ASCII without spaces; `openssl rand -hex 32` makes one"
    )

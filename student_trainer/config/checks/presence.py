"""The checks that a flag is given, and not without the one that it needs."""

from __future__ import annotations

from typing import Any

from shared.errors import ConfigurationError
from student_trainer.config.flags import flags_of


def require(value: str | None, flag: str, what: str) -> None:
    if not value:
        raise ConfigurationError(f"{flag} is missing: give {what}")


def check_needs(part: Any) -> None:
    """Check that no flag is given without the one that it needs, see `flags.flag`.

    Raises:
        ConfigurationError: a flag is given alone; the message names both.
    """
    for one in flags_of(type(part)).values():
        if one.needs is None or getattr(part, one.name) == one.default:
            continue
        name, value = one.needs
        given = getattr(part, name)
        if not given if value is True else given != value:
            needed = f"--{name}" if value is True else f"--{name} {value}"
            raise ConfigurationError(f"--{one.name} has no effect without {needed}")

"""Read YAML files, and turn their values into command-line arguments."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from shared.errors import ConfigurationError


def read_yaml(path: Path, name: str) -> Any:
    """Return the content of a YAML file.

    Raises:
        ConfigurationError: the file cannot be read or is not YAML; the message calls it ``name``.
    """
    try:
        return yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigurationError(f"{name}: {error.strerror or error}") from error
    except yaml.YAMLError as error:
        problem = " ".join(str(error).split())
        raise ConfigurationError(f"{name} is not valid YAML: {problem}") from error


def config_path(argv: Sequence[str]) -> Path | None:
    """Return the file that ``--config`` names in a command's arguments, or None."""
    for index, argument in enumerate(argv):
        if argument == "--config" and index + 1 < len(argv):
            return Path(argv[index + 1])
        if argument.startswith("--config="):
            return Path(argument.removeprefix("--config="))
    return None


def read_config(path: Path) -> dict[Any, Any]:
    """Return the content of the file that ``--config`` names, by flag name.

    Raises:
        ConfigurationError: the file cannot be read, or does not hold ``name: value`` lines.
    """
    content = read_yaml(path, f"--config {path}")
    if not isinstance(content, dict):
        raise ConfigurationError(f"--config {path} must hold `name: value` lines")
    return content


def to_argument(value: Any) -> str:
    """Return a value as a command line writes it."""
    return json.dumps(value) if isinstance(value, dict) else str(value)


def flag_arguments(name: str, value: Any) -> list[str]:
    """Return the arguments for a flag with its value or values; none for a value of None."""
    if value is None:
        return []
    if isinstance(value, list | tuple):
        return [f"--{name}", *map(to_argument, value)]
    return [f"--{name}={to_argument(value)}"]

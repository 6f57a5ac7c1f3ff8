"""YAML files, and flags from them. Nothing heavy is imported here."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from shared.errors import ConfigurationError


def read_yaml(path: Path, name: str) -> Any:
    """What a YAML file holds.

    Raises:
        ConfigurationError: it cannot be read, or is no YAML; it is called ``name`` there.
    """
    try:
        return yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigurationError(f"{name}: {error.strerror or error}") from error
    except yaml.YAMLError as error:
        problem = " ".join(str(error).split())
        raise ConfigurationError(f"{name} is not valid YAML: {problem}") from error


def config_path(words: Sequence[str]) -> Path | None:
    """The file that ``--config`` names among a command's flags."""
    for index, word in enumerate(words):
        if word == "--config" and index + 1 < len(words):
            return Path(words[index + 1])
        if word.startswith("--config="):
            return Path(word.removeprefix("--config="))
    return None


def read_config(path: Path) -> dict[Any, Any]:
    """What the file that ``--config`` names says, by the names of flags.

    Raises:
        ConfigurationError: it cannot be read, or is something else.
    """
    content = read_yaml(path, f"--config {path}")
    if not isinstance(content, dict):
        raise ConfigurationError(f"--config {path} must hold `name: value` lines")
    return content


def word_of(value: Any) -> str:
    """A value as a command line says it."""
    return json.dumps(value) if isinstance(value, dict) else str(value)


def flag_words(name: str, value: Any, word: Callable[[Any], str] = word_of) -> list[str]:
    """A flag with its value, or with several; none where the value is None."""
    if value is None:
        return []
    if isinstance(value, list | tuple):
        return [f"--{name}", *map(word, value)]
    return [f"--{name}={word(value)}"]

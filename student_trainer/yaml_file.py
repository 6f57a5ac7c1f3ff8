"""Reading a YAML file. Nothing heavy is imported here: every process of a study reads one."""

from __future__ import annotations

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
        raise ConfigurationError(f"{name} is not valid YAML: {error}") from error

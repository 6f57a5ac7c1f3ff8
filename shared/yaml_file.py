"""Read YAML files, and turn their values into command-line arguments."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from shared.errors import ConfigurationError
from shared.model_names import near_path


class _Loader(yaml.SafeLoader):
    """A loader that reads values as YAML 1.2 does, and as a command line would read their text.

    yes, no, on and off are text; true and false are bools. Numbers are decimal: 010, 0x10 and 1:30
    are text, which YAML 1.1 takes for 8, 16 and 90.
    """


_FORMS = {
    "bool": ("(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    "int": (r"[-+]?(?:0|[1-9][0-9_]*)$", "-+0123456789"),
    "float": (
        r"[-+]?(?:(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?"
        r"|\.(?:inf|Inf|INF))$|\.(?:nan|NaN|NAN)$",
        "-+0123456789.",
    ),
}
_TAG = "tag:yaml.org,2002:"
_Loader.yaml_implicit_resolvers = {
    start: [(tag, form) for tag, form in forms if tag.removeprefix(_TAG) not in _FORMS]
    for start, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _name, (_form, _starts) in _FORMS.items():
    _Loader.add_implicit_resolver(_TAG + _name, re.compile(_form), list(_starts))


def read_yaml(path: Path, name: str) -> Any:
    """Return the content of a YAML file.

    Raises:
        ConfigurationError: the file cannot be read or is not YAML; the message calls it ``name``.
    """
    try:
        loader = _Loader(path.read_text(encoding="utf-8"))
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except OSError as error:
        near = near_path(str(path)) if isinstance(error, FileNotFoundError) else ""
        raise ConfigurationError(f"{name}: {error.strerror or error}{near}") from error
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{name} is not UTF-8 text: {error}") from error
    except (yaml.YAMLError, ValueError) as error:  # a ValueError of a date of no calendar
        problem = " ".join(str(error).replace('in "<unicode string>", ', "in ").split())
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


def line_of(path: Path, key: str) -> int | None:
    """Return the line of a key at the top of a YAML file, from 1; None where it is not found."""
    with contextlib.suppress(OSError, ValueError, yaml.YAMLError):
        node = yaml.compose(path.read_text(encoding="utf-8"), _Loader)
        for name, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if str(name.value).replace("-", "_") == key.replace("-", "_"):
                return int(name.start_mark.line) + 1
    return None


def where_given(message: str, argv: Sequence[str]) -> str:
    """Return where a flag that an error names stands in the ``--config`` file: " (FILE, line N)".

    The result is empty where the message names the file, or no flag that the file gives.
    """
    path = config_path(argv)
    if path is None or str(path) in message:
        return ""
    given = {a.split("=")[0].replace("-", "_") for a in argv if a.startswith("--")}
    for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", message):
        line = None if flag.replace("-", "_") in given else line_of(path, flag[2:])
        if line is not None:
            return f" ({path}, line {line})"
    return ""


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

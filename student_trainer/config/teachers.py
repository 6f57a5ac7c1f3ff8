"""The teachers that ``--teacher_url`` names: addresses, and the models that requests name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from shared.address import server_address
from shared.errors import ConfigurationError

_NAMED = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)=(.*)", re.DOTALL)


@dataclass(frozen=True)
class ServedTeacher:
    """A teacher and where it is served.

    Attributes:
        name: by which rows call it; empty for the only teacher of a run.
        urls: addresses of its replicas.
        model: the model that requests name at a server of several; None for its first.
    """

    name: str
    urls: tuple[str, ...]
    model: str | None


def teachers_of(values: Sequence[str]) -> list[ServedTeacher]:
    """Return the teachers of ``--teacher_url``, in the order in which they are first named.

    A value is ``URL`` or ``NAME=URL``, and ends with ``#MODEL`` where the server has several
    models. Addresses of one name are replicas of one teacher.

    Raises:
        ConfigurationError: a value is no address or holds a password, only some have a name, or the
            addresses of one teacher name different models.
    """
    addresses: dict[str, list[str]] = {}
    models: dict[str, set[str | None]] = {}
    for value in values:
        named = _NAMED.fullmatch(value)
        name, url = named.groups() if named else ("", value)
        if "@" in url:  # the message must not show the password
            raise ConfigurationError(
                "--teacher_url holds a user or a password, which every log would show; give a key "
                "by the environment variable TEACHER_API_KEY or by --teacher_api_key_file"
            )
        url, _, model = url.partition("#")
        url = server_address(
            url,
            "--teacher_url",
            before=f"{name}=" if named else "",
            after=f"#{model}" if model else "",
        )
        addresses.setdefault(name, []).append(url)
        models.setdefault(name, set()).add(model or None)
    if "" in addresses and len(addresses) > 1:
        raise ConfigurationError(
            f"--teacher_url {addresses[''][0]} has no name, and {', '.join(filter(None, models))} "
            "has: name every teacher, as NAME=URL, or none"
        )
    for name, of_name in models.items():
        if len(of_name) > 1:
            raise ConfigurationError(
                f"--teacher_url {name or addresses[name][0]}: its addresses name different models "
                f"after '#': {', '.join(sorted(str(one) for one in of_name))}; give one"
            )
    return [ServedTeacher(name, tuple(urls), *models[name]) for name, urls in addresses.items()]


def check_teacher_sync(value: str) -> None:
    """Refuse ``--teacher_sync``: a wrong value by what is wrong, a right one as not built.

    Raises:
        ConfigurationError: always.
    """
    kind, _, number = value.partition("=")
    try:
        right = {"ema": lambda: 0 < float(number) < 1, "every": lambda: int(number) >= 1}[kind]()
    except (KeyError, ValueError):
        right = False
    if not right:
        raise ConfigurationError(
            f"--teacher_sync {value!r}: give ema=SHARE, from 0 to 1 without the ends, such as "
            "ema=0.99, or every=STEPS, a whole number from 1 on"
        )
    raise ConfigurationError(
        f"--teacher_sync {value}: a teacher server takes no weights while it runs (servers of "
        "--rollout_url do); drop it, and serve the trained model for a second round"
    )

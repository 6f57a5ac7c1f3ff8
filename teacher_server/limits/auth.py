"""Check API keys, of which the server keeps digests only."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
from collections.abc import Iterable

from shared.api_keys import check_key, read_keys
from shared.errors import ConfigurationError, UnauthorizedError
from teacher_server.settings import Settings

ENVIRONMENT = "TEACHER_API_KEYS"
# Fewest characters of a key: a digest without salt is only as safe as the key is hard to guess.
_SHORTEST = 16


class ApiKeys:
    """The keys that a server accepts; without any, every request is accepted."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = tuple({_digest(key) for key in keys})

    def __bool__(self) -> bool:
        return bool(self._digests)

    def check(self, authorization: str | None) -> str:
        """Check the key in ``Authorization: Bearer`` and return the beginning of its digest.

        Without keys the result is empty. The check takes constant time: each digest is compared,
        whether or not one before it is the same.

        Raises:
            UnauthorizedError: no key, or another one.
        """
        if not self._digests:
            return ""
        scheme, _, token = (authorization or "").partition(" ")
        if scheme.lower() != "bearer":
            raise UnauthorizedError("a key is needed: send the header Authorization: Bearer KEY")
        sent = _digest(token.strip())
        same = [hmac.compare_digest(sent, known) for known in self._digests]
        if not any(same):
            raise UnauthorizedError("the key is none of this server's")
        return sent.hex()[:16]


def load_keys(settings: Settings) -> ApiKeys:
    """Return the keys of ``--api-key-file`` and the environment, and remove them from there.

    The engine's processes inherit the environment and have no use for keys.

    Raises:
        ConfigurationError: a key is malformed or too short, or there is none where one is needed.
    """
    found: list[tuple[str, str]] = []
    if settings.api_key_file is not None:
        where = f"--api-key-file {settings.api_key_file}"
        found += [(key, where) for key in read_keys(settings.api_key_file, "--api-key-file")]
    given = re.split(r"[\s,]+", os.environ.pop(ENVIRONMENT, ""))
    found += [(check_key(key, ENVIRONMENT), ENVIRONMENT) for key in given if key]
    for key, where in found:
        if len(key) < _SHORTEST:
            raise ConfigurationError(
                f"{where} holds a key of {len(key)} characters, which can be guessed; take "
                f"{_SHORTEST} or more: `openssl rand -hex 32` makes one"
            )
    if found and settings.allow_unauthenticated:
        raise ConfigurationError(
            "--allow-unauthenticated contradicts the keys that are given; drop one of them"
        )
    if not found and not settings.loopback and not settings.allow_unauthenticated:
        raise ConfigurationError(
            f"--host {settings.host} is open to other machines, and there is no key: give some by "
            f"--api-key-file or {ENVIRONMENT}, or pass --allow-unauthenticated where all who reach "
            "this port may use it"
        )
    return ApiKeys(key for key, _ in found)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()

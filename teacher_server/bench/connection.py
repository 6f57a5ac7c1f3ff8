"""HTTP to a server under measurement: one connection a thread, kept open, without retries."""

from __future__ import annotations

import http.client
import json
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from shared import __version__
from shared.address import server_address
from shared.errors import ConfigurationError


@dataclass(frozen=True)
class Address:
    """The address of a server, its key, and the patience with it.

    Attributes:
        url: as given, without a slash at its end.
        key: one of its API keys; None where it has none.
        timeout: seconds for one answer.
    """

    url: str
    key: str | None = field(repr=False)
    timeout: float

    @classmethod
    def parse(cls, url: str, key: str | None, timeout: float) -> Address:
        """Return the address that a URL is of.

        Raises:
            ConfigurationError: it is no address of a server, or holds a password.
        """
        if "@" in url:  # the message must not show the password
            raise ConfigurationError(
                "the address holds a user or a password; give the key in TEACHER_API_KEY"
            )
        return cls(server_address(url, "URL"), key, timeout)


class Connection:
    """A connection that is kept open between requests; not to be shared by threads."""

    def __init__(self, address: Address) -> None:
        parts = urlsplit(address.url)
        kind = (
            http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        )
        self._path = parts.path
        self._connection = kind(parts.hostname or "", parts.port, timeout=address.timeout)
        self._headers = {"User-Agent": f"sparse-gkd-bench/{__version__}"}
        if address.key:
            self._headers["Authorization"] = f"Bearer {address.key}"

    def ask(self, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, bytes]:
        """Return (status, body) of an answer.

        Raises:
            OSError, http.client.HTTPException: no whole answer came.
        """
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        try:
            self._connection.request(
                method, self._path + path, body or None, {**self._headers, **named}
            )
            answer = self._connection.getresponse()
            return answer.status, answer.read()
        except BaseException:
            self._connection.close()  # the next request opens it again
            raise

    def close(self) -> None:
        self._connection.close()


def detail_of(body: bytes) -> str:
    """Return what a refusal says, in one line, whatever form it has."""
    try:
        found = json.loads(body)
        return str(found["detail"]) if isinstance(found, dict) and "detail" in found else ""
    except ValueError:
        return ""

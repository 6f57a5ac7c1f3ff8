"""HTTP to a server under measurement: one connection a thread, kept open, without retries."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
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
        timeout: seconds for one request, until the last byte of its answer.
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
        self._path, self._timeout = parts.path, address.timeout
        self._socket: socket.socket | None = None
        self._connection = kind(parts.hostname or "", parts.port, timeout=address.timeout)
        self._headers = {"User-Agent": f"sparse-gkd-bench/{__version__}"}
        if address.key:
            self._headers["Authorization"] = f"Bearer {address.key}"

    def ask(self, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, bytes]:
        """Return (status, body) of an answer.

        Raises:
            TimeoutError: no whole answer came within the address's timeout, however it came.
            OSError, http.client.HTTPException: no whole answer came.
        """
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        late = threading.Event()
        # The socket's own timeout, which begins anew with each byte, ends no answer that drips.
        timer = threading.Timer(self._timeout, self._cut, [late])
        timer.daemon = True
        timer.start()
        try:
            self._connection.request(
                method, self._path + path, body or None, {**self._headers, **named}
            )
            self._socket = self._connection.sock
            answer = self._connection.getresponse()
            return answer.status, answer.read()
        except BaseException as error:
            self._connection.close()  # the next request opens it again
            if late.is_set() or isinstance(error, TimeoutError):
                raise TimeoutError(f"no whole answer within {self._timeout:g} s") from error
            raise
        finally:
            timer.cancel()

    def _cut(self, late: threading.Event) -> None:
        """End the request under way; what reads its answer raises."""
        late.set()
        if self._socket is not None:
            with contextlib.suppress(OSError):  # it is closed already
                self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._connection.close()


def detail_of(body: bytes) -> str:
    """Return what a refusal says, in one line, whatever form it has."""
    try:
        found = json.loads(body)
        return str(found["detail"]) if isinstance(found, dict) and "detail" in found else ""
    except ValueError:
        return ""

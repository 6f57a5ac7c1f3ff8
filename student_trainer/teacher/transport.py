"""The HTTP transport of direct connections: one deadline for all reads and writes, and keep-alive.

httpx's own timeouts restart with each byte: a head that arrives slowly, or `100 Continue` without
end, would hold a thread and a connection for ever.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import time
import urllib.request
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import httpcore
import httpx

from student_trainer.runtime.compat import set_network_backend

# With keep-alive, a connection whose other end vanished fails after a minute, not at the timeout.
_KEEPALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3}
_PIECE = 1 << 14  # bytes written at once, so that the deadline is checked during slow writes


@dataclass
class _Bounds:
    """The limits of a thread's reads and writes."""

    until: float  # by time.monotonic
    bytes_left: float


_bounds: ContextVar[_Bounds | None] = ContextVar("_bounds", default=None)


@contextlib.contextmanager
def bounded(until: float, most: float = float("inf")) -> Iterator[None]:
    """Limit this thread's reads and writes on connections of `BoundedTransport` in the block.

    Args:
        until: deadline by `time.monotonic`; later reads and writes raise `httpx.TimeoutException`.
        most: bytes that may be read; more raise `httpx.RemoteProtocolError`.
    """
    token = _bounds.set(_Bounds(until, most))
    try:
        yield
    finally:
        _bounds.reset(token)


class BoundedTransport(httpx.HTTPTransport):
    """An `httpx.HTTPTransport` whose connections keep the limits of `bounded`."""

    def __init__(self, socket_options: Iterable[httpcore.SOCKET_OPTION]) -> None:
        super().__init__(socket_options=list(socket_options))
        set_network_backend(self, _Backend())


def direct_transport() -> BoundedTransport | None:
    """Return a transport with TCP keep-alive; None, httpx's own, if a proxy is configured."""
    if set(urllib.request.getproxies()) - {"no"}:
        return None
    options = [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)]
    for name, value in _KEEPALIVE.items():
        if hasattr(socket, name):
            options.append((socket.IPPROTO_TCP, getattr(socket, name), value))
    return BoundedTransport(options)


class _Backend(httpcore.SyncBackend):
    """A network backend that opens connections as `_Stream`."""

    def connect_tcp(self, *arguments: Any, **options: Any) -> httpcore.NetworkStream:
        return _Stream(super().connect_tcp(*arguments, **options))


class _Stream(httpcore.NetworkStream):
    """A network stream whose operations keep the limits of `bounded`."""

    def __init__(self, stream: httpcore.NetworkStream) -> None:
        self._stream = stream

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        data = self._stream.read(max_bytes, _left(timeout, httpcore.ReadTimeout))
        bounds = _bounds.get()
        if bounds is not None:
            bounds.bytes_left -= len(data)
            if bounds.bytes_left < 0:
                raise httpcore.RemoteProtocolError("a head without end")
        return data

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        for first in range(0, len(buffer), _PIECE):
            left = _left(timeout, httpcore.WriteTimeout)
            self._stream.write(buffer[first : first + _PIECE], left)

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> httpcore.NetworkStream:
        left = _left(timeout, httpcore.ConnectTimeout)
        return _Stream(self._stream.start_tls(ssl_context, server_hostname, left))

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


def _left(timeout: float | None, error: type[httpcore.TimeoutException]) -> float | None:
    """Return the smaller of the timeout and the time left until the deadline.

    Raises:
        error: the deadline is over.
    """
    bounds = _bounds.get()
    if bounds is None:
        return timeout
    left = bounds.until - time.monotonic()
    if left <= 0:
        raise error("the time for the whole is over")
    return left if timeout is None else min(timeout, left)

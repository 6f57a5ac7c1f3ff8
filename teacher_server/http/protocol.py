"""The limits of connections: their number, the time of a head, the pieces of a body."""

from __future__ import annotations

import asyncio
import resource
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

# Seconds from the first byte of a request, or from the connection, to the end of its head.
HEAD_SECONDS = 20.0
# The first pieces of a body may have any size, and further ones this many bytes in the mean, as
# each piece costs as much as hundreds of bytes.
_FREE_PIECES, _MEAN_PIECE = 256, 64
_DESCRIPTORS = 1 << 16


class _Connection(h11.Connection):
    """An h11 connection that refuses two length headers, and bodies in too many pieces."""

    pieces = 0
    size = 0

    def next_event(self) -> Any:
        event = super().next_event()
        if isinstance(event, h11.Request):
            self.pieces = self.size = 0
            names = {name for name, _ in event.headers}
            if {b"transfer-encoding", b"content-length"} <= names:
                # A proxy in front may have used the other header, so that the next bytes could be
                # another caller's request.
                raise h11.RemoteProtocolError("both Transfer-Encoding and Content-Length")
        elif isinstance(event, h11.Data):
            self.pieces += 1
            self.size += len(event.data)
            if self.pieces > _FREE_PIECES + self.size // _MEAN_PIECE:
                raise h11.RemoteProtocolError("a body in too many pieces")
        return event


class GuardedProtocol(H11Protocol):
    """The HTTP protocol of uvicorn with a time limit for heads and a limit of connections.

    Above the limit the connection that has waited longest without a request is closed, so that a
    newcomer is served while descriptors are left.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        limit = self.config.h11_max_incomplete_event_size
        self.conn = _Connection(h11.SERVER, *([] if limit is None else [limit]))
        self._head_timer: asyncio.TimerHandle | None = None
        self._waiting_since = self.loop.time()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)  # type: ignore[arg-type]
        self._watch_head()
        if len(self.connections) <= most_connections():
            return
        open_ones = [
            one
            for one in self.connections
            if isinstance(one, GuardedProtocol) and not one.transport.is_closing()
        ]
        if len(open_ones) > most_connections():
            waiting = [one for one in open_ones if one is not self and one.awaits_head]
            min(waiting, key=lambda one: one._waiting_since, default=self).transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._unwatch_head()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.awaits_head:
            self._watch_head()
        else:
            self._unwatch_head()

    def on_response_complete(self) -> None:
        self._waiting_since = self.loop.time()
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:  # an answer is under way, so none can be sent about the broken request
            self.transport.abort()

    @property
    def awaits_head(self) -> bool:
        """Return whether no request is under way, or only the beginning of its head."""
        return bool(self.conn.their_state is h11.IDLE)

    def _watch_head(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_SECONDS, self.timeout_keep_alive_handler)

    def _unwatch_head(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None


def most_connections() -> int:
    """Return the limit of connections: half of the descriptors, which leaves the model the rest."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(1, soft // 2)


def raise_descriptor_limit() -> None:
    """Raise the process's limit of descriptors as far as it may, up to `_DESCRIPTORS`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _DESCRIPTORS)
    if soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))

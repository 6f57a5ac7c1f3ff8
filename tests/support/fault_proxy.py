"""A proxy between a teacher and its client that passes HTTP on and breaks chosen answers."""

from __future__ import annotations

import contextlib
import gzip
import os
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from typing import Any
from urllib.parse import urlsplit

from pydantic import BaseModel

from shared import wire

_ENDLESS = 1 << 16  # bytes at once


@dataclass
class Exchange:
    """The teacher's answer, and the connection that waits for it.

    Attributes:
        over: set when the proxy closes, so that faults that stall end.
    """

    client: socket.socket
    status: int
    headers: dict[str, str]
    body: bytes
    over: threading.Event

    def head(self, length: int | None = None) -> bytes:
        """Return the head of the answer, with ``length`` in place of the body's own."""
        headers = {**self.headers, "Content-Length": str(len(self.body))}
        if length is not None:
            headers["Content-Length"] = str(length)
        lines = [f"HTTP/1.1 {self.status} Answer", *(f"{k}: {v}" for k, v in headers.items())]
        return ("\r\n".join(lines) + "\r\n\r\n").encode()

    def answer(self) -> None:
        self.client.sendall(self.head() + self.body)

    def drip(self, data: bytes, pause: float = 0.1) -> None:
        """Send a byte at a time until the proxy closes; each restarts the timeout of httpx."""
        for index in range(len(data)):
            self.client.sendall(data[index : index + 1])
            if self.over.wait(pause):
                return


Fault = Callable[[Exchange], None]


def passed_on(exchange: Exchange) -> None:
    exchange.answer()


def closed_without_an_answer(exchange: Exchange) -> None:
    exchange.client.shutdown(socket.SHUT_RDWR)


def reset_without_an_answer(exchange: Exchange) -> None:
    """Close with RST instead of FIN."""
    exchange.client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    os.close(exchange.client.detach())  # `close` waits for the file made of the socket


def reset_in_the_body(exchange: Exchange) -> None:
    exchange.client.sendall(exchange.head() + exchange.body[: len(exchange.body) // 2])
    time.sleep(0.05)  # a reset throws away what was sent and not read
    reset_without_an_answer(exchange)


def cut_in_the_body(exchange: Exchange) -> None:
    exchange.client.sendall(exchange.head() + exchange.body[: len(exchange.body) // 2])
    exchange.client.shutdown(socket.SHUT_RDWR)


def silent_in_the_body(exchange: Exchange) -> None:
    exchange.client.sendall(exchange.head() + exchange.body[: len(exchange.body) // 2])
    exchange.over.wait()


def silent(exchange: Exchange) -> None:
    exchange.over.wait()


def late(seconds: float) -> Fault:
    def fault(exchange: Exchange) -> None:
        exchange.over.wait(seconds)
        exchange.answer()

    return fault


def dripping_head(exchange: Exchange) -> None:
    exchange.drip(exchange.head())


def dripping_body(exchange: Exchange) -> None:
    exchange.client.sendall(exchange.head())
    exchange.drip(exchange.body)


def endless_head(exchange: Exchange) -> None:
    exchange.client.sendall(b"HTTP/1.1 200 OK\r\n")
    while not exchange.over.is_set():
        exchange.client.sendall(b"X-More: " + b"x" * _ENDLESS + b"\r\n")


def endless_body(exchange: Exchange) -> None:
    del exchange.headers["Content-Type"]
    exchange.client.sendall(exchange.head(length=1 << 40))
    while not exchange.over.is_set():
        exchange.client.sendall(bytes(_ENDLESS))


def not_http(exchange: Exchange) -> None:
    exchange.client.sendall(b"SSH-2.0-OpenSSH_9.6\r\n" * 3)
    exchange.client.shutdown(socket.SHUT_RDWR)


def answered(status: int, body: bytes = b"", **headers: str) -> Fault:
    """Return a fault that answers by itself; underscores in names of headers become dashes."""

    def fault(exchange: Exchange) -> None:
        exchange.status, exchange.body = status, body
        exchange.headers = {name.replace("_", "-"): value for name, value in headers.items()}
        exchange.answer()

    return fault


def compressed(exchange: Exchange) -> None:
    """A bomb: 64 MiB of zeros that travel as 64 KiB."""
    exchange.body = gzip.compress(bytes(64 << 20))
    exchange.headers["Content-Encoding"] = "gzip"
    exchange.answer()


def of_another_type(exchange: Exchange) -> None:
    exchange.headers["Content-Type"] = "text/html; charset=utf-8"
    exchange.answer()


def truncated(exchange: Exchange) -> None:
    """Answer with half of the body, and a length that agrees."""
    exchange.body = exchange.body[: len(exchange.body) // 2]
    exchange.answer()


def scrambled(exchange: Exchange) -> None:
    exchange.body = bytes(255 - byte for byte in exchange.body)
    exchange.answer()


def sent_twice(exchange: Exchange) -> None:
    """Send the answer twice, so that the next request on the connection reads the copy."""
    exchange.client.sendall((exchange.head() + exchange.body) * 2)


def changed(kind: type[BaseModel], change: Callable[[Any], dict[str, Any]]) -> Fault:
    """Return a fault that changes the message's fields to those that ``change`` returns."""

    def fault(exchange: Exchange) -> None:
        message = wire.load(kind, exchange.body, wire.MSGPACK_MEDIA_TYPE, max_bytes=1 << 28)
        message = message.model_copy(update=change(message))
        exchange.body = wire.dump(message, wire.MSGPACK_MEDIA_TYPE)
        exchange.answer()

    return fault


@dataclass
class FaultProxy:
    """A proxy that passes requests on and applies ``faults``, one to each POST answer.

    Attributes:
        upstream: address of the teacher. If nothing listens there, the connection is closed.
        faults: of the next answers; without any, answers are passed on.
        always: the fault of every answer that has none of its own.
        ready: the fault of every answer of ``/ready``.
        asked: POST requests so far.
        url: the proxy's own address, while it is `serving`.
    """

    upstream: str
    faults: list[Fault] = field(default_factory=list)
    always: Fault = passed_on
    ready: Fault = passed_on
    asked: int = 0
    url: str = ""
    _over: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @contextlib.contextmanager
    def serving(self, port: int = 0, tls: ssl.SSLContext | None = None) -> Iterator[FaultProxy]:
        """Serve at ``port`` or a free one; at the end open connections break."""
        self._over.clear()
        connections: list[socket.socket] = []
        with socket.create_server(("127.0.0.1", port)) as listening:
            scheme = "http" if tls is None else "https"
            self.url = f"{scheme}://127.0.0.1:{listening.getsockname()[1]}"

            def accept() -> None:
                with contextlib.suppress(OSError):  # closed
                    while True:
                        client, _ = listening.accept()
                        talk = (client, tls, connections)
                        threading.Thread(target=self._serve, args=talk, daemon=True).start()

            thread = threading.Thread(target=accept, daemon=True)
            thread.start()
            try:
                yield self
            finally:
                self._over.set()
                listening.shutdown(socket.SHUT_RDWR)
                thread.join()
                for client in connections:
                    with contextlib.suppress(OSError):  # closed already
                        client.shutdown(socket.SHUT_RDWR)

    def _serve(
        self, client: socket.socket, tls: ssl.SSLContext | None, connections: list[socket.socket]
    ) -> None:
        with contextlib.suppress(OSError, HTTPException):  # of either side
            if tls is not None:
                client = tls.wrap_socket(client, server_side=True)
            connections.append(client)
            with client, client.makefile("rb") as requests:
                # The first byte of TLS is neither, so that connection is closed.
                while requests.peek(1)[:1] in (b"G", b"P"):
                    line = requests.readline()
                    method, path, _ = line.decode().split(" ")
                    headers = {}
                    while (header := requests.readline().decode().strip()) != "":
                        name, value = header.split(": ", 1)
                        headers[name] = value
                    body = requests.read(int(headers.get("Content-Length", 0)))
                    fault = self._next() if method == "POST" else passed_on
                    fault = self.ready if path == "/ready" else fault
                    fault(self._ask(client, method, path, headers, body))

    def _next(self) -> Fault:
        with self._lock:
            self.asked += 1
            return self.faults.pop(0) if self.faults else self.always

    def _ask(
        self, client: socket.socket, method: str, path: str, headers: dict[str, str], body: bytes
    ) -> Exchange:
        connection = HTTPConnection(urlsplit(self.upstream).netloc, timeout=60)
        with contextlib.closing(connection):
            connection.request(method, path, body or None, headers)
            answer = connection.getresponse()
            kept = {k: v for k, v in answer.getheaders() if k in ("Content-Type", "Retry-After")}
            return Exchange(client, answer.status, kept, answer.read(), self._over)

"""A long wire on one machine: a TCP relay that needs no privileges and no kernel module."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from urllib.parse import urlsplit

_FIRST_WINDOW = 10 * 1460  # bytes a new connection sends before the first acknowledgement
_IDLE = 0.2  # seconds of silence after which TCP begins anew
_CHUNK = 1 << 16


class _Direction:
    """A direction of the link, whose rate all connections share."""

    def __init__(self, seconds: float, bits_per_second: float) -> None:
        self.seconds = seconds
        self.bits_per_second = bits_per_second
        self._free = 0.0  # when the last byte will have left

    def arrival(self, now: float, size: int) -> float:
        self._free = max(self._free, now) + 8 * size / self.bits_per_second
        return self._free + self.seconds


async def _pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter, way: _Direction) -> None:
    """Copy ``source`` to ``sink``, late, and no faster than slow start and the wire allow."""
    loop = asyncio.get_running_loop()
    on_the_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

    async def deliver() -> None:
        while True:
            due, data = await on_the_way.get()
            await asyncio.sleep(due - loop.time())
            if not data:
                break
            sink.write(data)
            await sink.drain()
        sink.close()

    delivery = asyncio.create_task(deliver())
    window = unsent = _FIRST_WINDOW  # bytes; those that may still be sent before a pause
    round_trip, last = loop.time(), loop.time()
    with contextlib.suppress(OSError):
        while data := await source.read(min(_CHUNK, unsent)):
            now = loop.time()
            if now - last > _IDLE:
                window = unsent = _FIRST_WINDOW
                round_trip = now
            last = now
            unsent -= len(data)
            on_the_way.put_nowait((way.arrival(now, len(data)), data))
            if unsent <= 0:  # wait until the window is acknowledged
                await asyncio.sleep(round_trip + 2 * way.seconds - loop.time())
                window *= 2
                unsent, round_trip = window, loop.time()
    on_the_way.put_nowait((loop.time() + way.seconds, b""))
    with contextlib.suppress(OSError):
        await delivery


@contextlib.contextmanager
def link(url: str, *, round_trip: float, bits_per_second: float) -> Iterator[str]:
    """Yield an address at the near end of a long wire to ``url``.

    The wire has a round trip (in seconds, half of it each way, and once for a handshake), a rate
    in each direction, and TCP's slow start after silence, but no loss.
    """
    target = urlsplit(url)
    loop = asyncio.new_event_loop()
    there, back = (_Direction(round_trip / 2, bits_per_second) for _ in range(2))

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(round_trip)
        try:
            far_reader, far_writer = await asyncio.open_connection(target.hostname, target.port)
        except OSError:
            writer.close()
            return
        await asyncio.gather(_pump(reader, far_writer, there), _pump(far_reader, writer, back))

    server = loop.run_until_complete(asyncio.start_server(connected, "127.0.0.1", 0))
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        server.close()
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()

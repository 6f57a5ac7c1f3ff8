"""A long wire on one machine: a TCP relay that needs no privileges and no kernel module.

As a benchmark: how much later than the wire that it imitates an answer arrives.

    python -m benchmarks.link --quick
"""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from urllib.parse import urlsplit

import httpx

from benchmarks.harness import Cell, Worker, argument_parser, print_report

_FIRST_WINDOW = 10 * 1460  # bytes a new connection sends before the first acknowledgement
_IDLE = 0.2  # seconds of silence after which TCP begins anew
_CHUNK = 1 << 16


class _Direction:
    """One way through the link, shared by all connections."""

    def __init__(self, seconds: float, bits_per_second: float) -> None:
        self.seconds = seconds
        self.bits_per_second = bits_per_second
        self._free = 0.0  # when the last byte will have left

    def arrival(self, now: float, size: int) -> float:
        self._free = max(self._free, now) + 8 * size / self.bits_per_second
        return self._free + self.seconds


async def _pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter, way: _Direction) -> None:
    """Pass bytes on, late, and no faster than slow start and the wire allow."""
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
    window = left = _FIRST_WINDOW
    round_trip, last = loop.time(), loop.time()
    with contextlib.suppress(OSError):
        while data := await source.read(min(_CHUNK, left)):
            now = loop.time()
            if now - last > _IDLE:
                window = left = _FIRST_WINDOW
                round_trip = now
            last = now
            left -= len(data)
            on_the_way.put_nowait((way.arrival(now, len(data)), data))
            if left <= 0:  # until it is acknowledged
                await asyncio.sleep(round_trip + 2 * way.seconds - loop.time())
                window *= 2
                left, round_trip = window, loop.time()
    on_the_way.put_nowait((loop.time() + way.seconds, b""))
    with contextlib.suppress(OSError):
        await delivery


@contextlib.contextmanager
def link(url: str, *, round_trip: float, bits_per_second: float) -> Iterator[str]:
    """Give another address for ``url``, at the other end of a long wire.

    Imitated are the round trip (in seconds, half of it each way, and once for a handshake), the
    rate in each direction, and TCP's slow start after silence; not loss.
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


# The benchmark.

CASES = ((0.02, 1e9, 1_000), (0.02, 1e9, 1_000_000), (0.02, 1e8, 1_000_000))


def serve(parent: Connection) -> None:
    """Answer ``/SIZE`` with so many bytes, in a child, and send the address."""
    from tests.support import stub

    class Sized:
        def get(self, path: str) -> stub.Answer:
            return 200, {}, bytes(int(path.removeprefix("/")))

        def post(self, path: str, body: bytes) -> stub.Answer:
            return self.get(path)

    with stub.serving(Sized()) as url:
        parent.send(url)
        parent.recv()  # until the benchmark ends


def measure(url: str, round_trip: float, bits_per_second: float, size: int, rounds: int) -> float:
    """Return the median seconds of an answer of ``size`` bytes over a link that is warm."""
    seconds = []
    wire = {"round_trip": round_trip, "bits_per_second": bits_per_second}
    with link(url, **wire) as far, httpx.Client(timeout=60) as client:
        for _ in range(rounds + 2):  # the first open the connection and TCP's window
            since = time.perf_counter()
            client.get(f"{far}/{size}").raise_for_status()
            seconds.append(time.perf_counter() - since)
    return statistics.median(seconds[2:])


def main() -> None:
    """Measure answers of several sizes and print them beside what the wire itself takes."""
    quick = argument_parser(__doc__, quick="5 rounds instead of 50").parse_args().quick
    rows: list[list[Cell]] = []
    figures: dict[str, float] = {}
    with Worker(serve) as server:
        url = server.receive()
        for round_trip, bits_per_second, size in CASES:
            imitated = round_trip + 8 * size / bits_per_second
            found = measure(url, round_trip, bits_per_second, size, 5 if quick else 50)
            wire = f"{bits_per_second / 1e6:g} Mbit/s"
            rows.append([f"{size:,} bytes, {wire}", imitated, found, found - imitated])
            figures[f"late_{size}_bytes_{bits_per_second / 1e6:g}_mbit"] = found - imitated
    columns = ["answer", "wire s", "measured s", "late s"]
    print_report("The imitated wire", columns, rows, figures)


if __name__ == "__main__":
    main()

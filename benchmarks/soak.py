"""A teacher server under twice the load that it can take, for a long time: errors, memory, latency.

    python -m benchmarks.soak                # 30 minutes
    python -m benchmarks.soak --quick        # half a minute
    python -m benchmarks.soak --minutes 3

First the capacity is measured: 16 clients that wait for each answer, for 20 seconds. Then each
sends at a 16th of twice that rate, answered or not. What is over the capacity must be refused at
once, by 429 or 503 with Retry-After, and cost neither memory nor the time of those admitted.
"""

from __future__ import annotations

import asyncio
import itertools
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import numpy as np

from benchmarks.harness import Cell, argument_parser, listener, print_report, resident_bytes
from shared import wire
from shared.protocol import GenerateRequest, ScoreRequest, ScoreSequence
from tests.support.models import save_model, save_tokenizer
from tests.support.server import running_server

CLIENTS = 16
VOCAB_SIZE, LENGTH, QUEUED_TOKENS = 8_192, 512, 65_536
CALIBRATION_SECONDS, MINUTES = 20.0, 30.0
QUICK_CALIBRATION_SECONDS, QUICK_MINUTES = 5.0, 0.5
OVERLOAD = 2.0
WARM_UP = 0.2  # of the time, before which memory is not compared
REFUSED = (429, 503)
NOTES = (
    f"{CLIENTS} clients; a request is four sequences of 64 to {LENGTH} tokens to score, k = 64; "
    "one in ten is a prompt to continue by 16 tokens. transformers backend, one thread, room for "
    f"{QUEUED_TOKENS} tokens.",
    "memory: resident, median of the last tenth of the time over that of the tenth after the first "
    f"{WARM_UP:.0%}, which are the warm-up.",
    "fairness: requests answered 200, of the client with fewest over the one with most.",
)


@dataclass
class Seen:
    """The answers that the clients got, and the server's memory."""

    statuses: Counter[str] = field(default_factory=Counter)
    answered: Counter[int] = field(default_factory=Counter)  # 200s of each client
    latencies: list[float] = field(default_factory=list)  # of those
    without_retry_after: int = 0
    memory: list[int] = field(default_factory=list)  # bytes, at even intervals


def requests(client: int) -> Iterator[tuple[str, bytes]]:
    """Yield (route, body) again and again."""
    rng = np.random.default_rng(client)
    for number in itertools.count():
        if number % 10 == 9:
            prompt = rng.integers(0, 260, 32).astype(np.uint32)
            asked = GenerateRequest(prompts=[prompt], max_new_tokens=16, seed=number)
            yield "/v1/generate", wire.dump(asked, wire.MSGPACK_MEDIA_TYPE)
            continue
        lengths = rng.integers(64, LENGTH, 4)
        sequences = [
            ScoreSequence(
                token_ids=rng.integers(0, VOCAB_SIZE, length).astype(np.uint32),
                completion_start=int(length) // 4,
            )
            for length in lengths
        ]
        score = ScoreRequest(sequences=sequences, top_k=64, logprob_dtype="float16")
        yield "/v1/score", wire.dump(score, wire.MSGPACK_MEDIA_TYPE)


def key(client: int) -> str:
    """Return the key that makes it a client of its own."""
    return f"client-of-the-soak-{client}"


async def ask(http: httpx.AsyncClient, client: int, route: str, body: bytes, seen: Seen) -> None:
    headers = {"content-type": wire.MSGPACK_MEDIA_TYPE, "authorization": f"Bearer {key(client)}"}
    since = time.perf_counter()
    try:
        response = await http.post(route, content=body, headers=headers)
    except httpx.HTTPError as error:
        seen.statuses[type(error).__name__] += 1
        return
    seen.statuses[str(response.status_code)] += 1
    if response.status_code == 200:
        seen.answered[client] += 1
        seen.latencies.append(time.perf_counter() - since)
    elif "retry-after" not in response.headers:
        seen.without_retry_after += 1


async def capacity(http: httpx.AsyncClient, seconds: float) -> float:
    """Return the requests a second while every client waits for its answers."""
    seen = Seen()
    until = time.monotonic() + seconds

    async def one(client: int) -> None:
        for route, body in requests(client):
            if time.monotonic() > until:
                return
            await ask(http, client, route, body, seen)

    await asyncio.gather(*map(one, range(CLIENTS)))
    assert set(seen.statuses) == {"200"}, seen.statuses
    return len(seen.latencies) / seconds


async def overload(http: httpx.AsyncClient, url: str, rate: float, seconds: float) -> Seen:
    """Return what all clients see who together send ``rate`` requests a second."""
    seen = Seen()
    server = listener(url)
    until = time.monotonic() + seconds

    async def one(client: int) -> None:
        rng = np.random.default_rng(client)
        async with asyncio.TaskGroup() as group:
            for route, body in requests(client):
                await asyncio.sleep(float(rng.exponential(CLIENTS / rate)))
                if time.monotonic() > until:
                    return
                group.create_task(ask(http, client, route, body, seen))

    async def watch() -> None:
        for _ in range(100):
            await asyncio.sleep(seconds / 100)
            seen.memory.append(resident_bytes(server))

    await asyncio.gather(watch(), *map(one, range(CLIENTS)))
    return seen


async def soak(url: str, calibration: float, minutes: float) -> tuple[float, Seen]:
    """Measure the capacity for ``calibration`` seconds, then overload the server."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as http:
        found = await capacity(http, calibration)
        return found, await overload(http, url, OVERLOAD * found, minutes * 60)


def main() -> None:
    parser = argument_parser(
        __doc__,
        quick=f"{QUICK_MINUTES:g} minutes, {QUICK_CALIBRATION_SECONDS:g} seconds of calibration",
    )
    parser.add_argument("--minutes", type=float, help=f"default {MINUTES:g}")
    arguments = parser.parse_args()
    minutes = arguments.minutes or (QUICK_MINUTES if arguments.quick else MINUTES)
    calibration = QUICK_CALIBRATION_SECONDS if arguments.quick else CALIBRATION_SECONDS
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_tokenizer(folder)
        save_model(folder, vocab_size=VOCAB_SIZE, hidden_size=128, max_position_embeddings=LENGTH)
        flags = [f"--max-{of}-tokens={QUEUED_TOKENS}" for of in ("queued", "request")]
        keys = folder / "keys"
        keys.write_text("\n".join(map(key, range(CLIENTS))))
        keys.chmod(0o600)
        flags += ["--api-key-file", str(keys)]
        with running_server(folder, *flags) as url:
            found, seen = asyncio.run(soak(url, calibration, minutes))
    total = sum(seen.statuses.values())
    refused = sum(seen.statuses[str(status)] for status in REFUSED)
    first, tenth = int(WARM_UP * len(seen.memory)), len(seen.memory) // 10
    settled = statistics.median(seen.memory[first : first + tenth])
    p50, p99 = (float(q) for q in np.quantile(seen.latencies, [0.5, 0.99]))
    answered = [seen.answered[client] for client in range(CLIENTS)]
    rows: list[list[Cell]] = [
        [status, count, count / total] for status, count in seen.statuses.most_common()
    ]
    print_report(
        f"{minutes:g} minutes at {OVERLOAD:g} times the capacity of {found:.1f} requests/s",
        ["answer", "requests", "share"],
        rows,
        {
            "minutes": minutes,
            "requests": total,
            "offered_over_capacity": total / (minutes * 60) / found,
            "answered_over_capacity": seen.statuses["200"] / (minutes * 60) / found,
            "errors": total - seen.statuses["200"] - refused,
            "refusals_without_retry_after": seen.without_retry_after,
            "memory_growth": statistics.median(seen.memory[-tenth:]) / settled - 1,
            "memory_mib": seen.memory[-1] / 2**20,
            "latency_p50_seconds": p50,
            "latency_p99_seconds": p99,
            "fairness": min(answered) / max(answered),
        },
        notes=NOTES,
    )


if __name__ == "__main__":
    main()

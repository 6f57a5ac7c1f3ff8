"""Measure how long `/health` waits while the server handles each hostile request of a corpus.

    python -m benchmarks.hostile
    python -m benchmarks.hostile --checkout ../older   # the server of another checkout

The aim is 100 ms. The attacker and the caller of `/health` share the machine's cores with the
server, so their work is part of the time.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from pathlib import Path

import httpx

from benchmarks.report import Cell, print_report
from tests.support.hostile import CONTEXT, Attack, attacks
from tests.support.models import save_model, save_tokenizer
from tests.support.server import free_port, start_server, wait_until_ready

MODEL = "attacked"
PATIENCE = 120.0  # seconds after which an attack counts as one that froze the server


def main() -> None:
    """Run every attack on a server of a tiny model with a long context."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--checkout", type=Path, help="folder whose teacher_server is attacked")
    parser.add_argument("--quick", action="store_true", help="only the first three attacks")
    options = parser.parse_args()
    # `python -m` looks into the working directory first.
    launcher = () if options.checkout is None else ("env", "-C", str(options.checkout))
    with tempfile.TemporaryDirectory() as folder:
        model, log, port = Path(folder) / "model", Path(folder) / "log", free_port()
        save_tokenizer(model)
        save_model(model, max_position_embeddings=CONTEXT)
        arguments = ("--served-model-name", MODEL)
        process = start_server(model, *arguments, port=port, log=log, launcher=launcher)
        url = f"http://127.0.0.1:{port}"
        try:
            wait_until_ready(process, url, log)
            rows: list[list[Cell]] = []
            for attack in attacks(MODEL)[: 3 if options.quick else None]:
                rows.append([attack.name, *_attacked(url, attack)])
        finally:
            process.kill()
            process.wait()
    longest = [float(row[-1]) for row in rows]
    print_report(
        "Hostile requests",
        ("attack", "answer", "seconds", "longest /health, ms"),
        rows,
        {"attacks": len(rows), "health_ms_max": max(longest), "over_100_ms": sum(
            one > 100 for one in longest
        )},
    )  # fmt: skip


def _attacked(url: str, attack: Attack) -> tuple[str, float, float]:
    """Return (status, seconds of the attack, the longest wait for `/health` in ms)."""
    waits: list[float] = []
    ended = threading.Event()

    def call_health() -> None:
        with httpx.Client(timeout=2 * PATIENCE) as client:
            while not (ended.is_set() and waits):
                since = time.perf_counter()
                client.get(f"{url}/health")
                waits.append(1e3 * (time.perf_counter() - since))
                ended.wait(0.01)

    body = attack.make()
    caller = threading.Thread(target=call_health)
    caller.start()
    since = time.perf_counter()
    try:
        response = httpx.post(
            f"{url}{attack.path}", content=body, headers={"content-type": attack.media_type},
            timeout=PATIENCE,
        )  # fmt: skip
        status = str(response.status_code)
    except httpx.TransportError as error:
        status = type(error).__name__
    seconds = time.perf_counter() - since
    ended.set()
    caller.join()
    return status, seconds, max(waits)


if __name__ == "__main__":
    main()

"""The wait of others while one request is hostile: `/health` beside each of a corpus of attacks.

    python -m benchmarks.hostile
    python -m benchmarks.hostile --checkout ../older   # the server of another checkout

The aim is 100 ms. What is measured includes the attacker and the asker, who share the machine's
cores with the server.
"""

from __future__ import annotations

import tempfile
import threading
import time
from pathlib import Path

import httpx

from benchmarks.harness import Cell, argument_parser, print_report
from tests.support.hostile import CONTEXT, Attack, attacks
from tests.support.models import save_model, save_tokenizer
from tests.support.server import running_server

MODEL = "attacked"
PATIENCE = 120.0  # seconds after which an attack counts as one that froze the server


def main() -> None:
    """Attack a server of a tiny model with a long context."""
    parser = argument_parser(__doc__, quick="only the first three attacks")
    parser.add_argument("--checkout", type=Path, help="folder whose teacher_server is attacked")
    options = parser.parse_args()
    # `python -m` looks into the working directory first.
    launcher = () if options.checkout is None else ("env", "-C", str(options.checkout))
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder)
        save_tokenizer(model)
        save_model(model, max_position_embeddings=CONTEXT)
        with running_server(model, "--served-model-name", MODEL, launcher=launcher) as url:
            rows: list[list[Cell]] = [
                [attack.name, *_attacked(url, attack)]
                for attack in attacks(MODEL)[: 3 if options.quick else None]
            ]
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

    def ask() -> None:
        with httpx.Client(timeout=2 * PATIENCE) as client:
            while not (ended.is_set() and waits):
                since = time.perf_counter()
                client.get(f"{url}/health")
                waits.append(1e3 * (time.perf_counter() - since))
                ended.wait(0.01)

    body = attack.make()
    asker = threading.Thread(target=ask)
    asker.start()
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
    asker.join()
    return status, seconds, max(waits)


if __name__ == "__main__":
    main()

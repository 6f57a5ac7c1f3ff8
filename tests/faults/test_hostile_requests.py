"""No request stops the others: the event loop's lag under each of a corpus of hostile ones."""

import contextlib
import threading
import time

import httpx
import psutil
import pytest

from tests.support.hostile import CONTEXT, attacks
from tests.support.models import save_model, save_tokenizer
from tests.support.server import free_port, start_server, wait_until_ready

# Seconds. The aim is a few milliseconds; two cores that run the attacker, the model and other
# tests as well add what nobody can take away.
LONGEST_LAG = 0.25
MODEL = "attacked"
ATTACKS = attacks(MODEL)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """(address, process) of a server whose model has a long context."""
    folder = tmp_path_factory.mktemp("llama")
    save_tokenizer(folder)
    save_model(folder, max_position_embeddings=CONTEXT)
    port, log = free_port(), tmp_path_factory.mktemp("server") / "log"
    process = start_server(folder, "--served-model-name", MODEL, port=port, log=log)
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until_ready(process, url, log)
        warm = {"model": MODEL, "prompt": "a", "max_tokens": 1}
        assert httpx.post(f"{url}/v1/completions", json=warm, timeout=60).status_code == 200
        yield url, psutil.Process(process.pid)
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def watched(url):
    """A list that gets the seconds of each call of ``/health`` made meanwhile."""
    seconds, connected, ended = [], threading.Event(), threading.Event()

    def ask():
        with httpx.Client(timeout=60) as client:
            client.get(f"{url}/health")
            connected.set()
            while not (ended.is_set() and seconds):
                since = time.perf_counter()
                assert client.get(f"{url}/health").status_code == 200
                seconds.append(time.perf_counter() - since)
                ended.wait(0.01)

    thread = threading.Thread(target=ask)
    thread.start()
    assert connected.wait(60)
    try:
        yield seconds
    finally:
        ended.set()
        thread.join()


def late(url):
    """Return how often the loop was later than `LONGEST_LAG`."""
    text, name = httpx.get(f"{url}/metrics").text, "teacher_event_loop_lag_seconds"
    lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if line.startswith(name))
    return float(lines[f"{name}_count"]) - float(lines[f'{name}_bucket{{le="{LONGEST_LAG}"}}'])


@pytest.mark.parametrize("attack", ATTACKS, ids=[attack.name for attack in ATTACKS])
def test_a_hostile_request_stops_nobody(server, attack):
    url, process = server
    body = attack.make()
    before, memory = late(url), process.memory_info().rss
    with watched(url) as seconds:
        response = httpx.post(
            f"{url}{attack.path}", content=body, headers={"content-type": attack.media_type},
            timeout=60,
        )  # fmt: skip
    assert response.status_code in attack.statuses, response.text[:300]
    assert late(url) == before
    assert max(seconds) < LONGEST_LAG
    assert process.memory_info().rss - memory < 600 << 20

"""The end of a server: told to, with a dead engine, killed. Each ends one that others have used."""

import contextlib
import signal
import threading

import httpx
import psutil
import pytest

from tests.api.test_lifecycle import LONG, SHORT, problem
from tests.support.http import metric, until
from tests.support.vllm import only


def test_sigterm_finishes_what_runs_and_exits_with_zero(strict):
    server, url, log = strict.server.process, strict.url, strict.server.log
    until(lambda: metric(url, "teacher_queued_tokens") == 0)
    answers = []

    def generate():
        asked = {**LONG, "max_new_tokens": 400}
        answers.append(httpx.post(f"{url}/v1/generate", json=asked, timeout=60))

    client = threading.Thread(target=generate)
    client.start()
    until(lambda: metric(url, "teacher_queued_tokens") == 403)
    server.send_signal(signal.SIGTERM)
    until(lambda: httpx.get(f"{url}/ready").status_code == 503)
    refused = httpx.post(f"{url}/v1/score", json=SHORT)
    assert "shutting down" in problem(refused, 503).detail
    assert int(refused.headers["retry-after"]) >= 1
    assert httpx.get(f"{url}/health").status_code == 200
    assert not answers  # what ran goes on all the while
    client.join()
    assert answers[0].status_code == 200
    assert len(answers[0].json()["completions"][0][0]["token_ids"]) == 400
    assert server.wait(60) == 0, log.read_text()
    assert "Traceback" not in log.read_text()
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/health")


@only("vllm")
def test_a_server_whose_engine_died_is_not_ready(teacher):
    server, url = teacher.server.process, teacher.url
    for engine in psutil.Process(server.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            engine.kill()
    until(lambda: httpx.get(f"{url}/ready").status_code == 503)
    probes = [httpx.get(f"{url}/{route}") for route in ("ready", "health")]
    for response in (*probes, httpx.post(f"{url}/v1/score", json=SHORT)):
        assert "the engine is dead; restart the server" in problem(response, 503).detail
    server.send_signal(signal.SIGTERM)
    assert server.wait(60) == 0, teacher.server.log.read_text()


@only("vllm")
def test_an_engine_does_not_outlive_a_server_that_is_killed(half):
    server = half.server.process
    family = psutil.Process(server.pid).children(recursive=True)
    assert len(family) >= 2
    server.kill()
    server.wait()
    assert psutil.wait_procs(family, timeout=60)[1] == []

"""A server's life: loading, full, late, abandoned, drained; each by really causing it."""

import contextlib
import signal
import socket
import threading

import httpx
import psutil

from shared.protocol import Problem
from tests.support.http import LEFT, client_at, engine_metric, metric, until
from tests.support.server import free_port, running_server, start_server, wait_until_ready
from tests.support.vllm import only

# Greedy and never at an end token: about three milliseconds a token on one core.
LONG = {"prompts": [[5, 6, 7]], "max_new_tokens": 7_000, "temperature": 0.0}
SHORT = {"sequences": [{"token_ids": [1, 2, 3], "completion_start": 1}], "top_k": 3}


def problem(response, status):
    assert response.status_code == status, response.text[:300]
    return Problem.model_validate(response.json())


@contextlib.contextmanager
def long_generation(url):
    """A client of its own that generates for seconds; leaves when the block ends."""
    host, port = url.removeprefix("http://").split(":")
    request = httpx.Request("POST", f"{url}/v1/generate", json=LONG)
    head = f"POST /v1/generate HTTP/1.1\r\nHost: {host}\r\n"
    head += "".join(f"{k}: {v}\r\n" for k, v in request.headers.items() if k != "host")
    until(lambda: metric(url, "teacher_queued_tokens") == 0)
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(head.encode() + b"\r\n" + request.content)
        until(lambda: metric(url, "teacher_queued_tokens") == 7_003)
        yield connection


def test_a_full_queue_refuses_and_says_when_to_come_back(strict):
    with long_generation(strict.url):
        wide = {"sequences": [{"token_ids": [1] * 998, "completion_start": 1}], "top_k": 1}
        response = httpx.post(f"{strict.url}/v1/score", json=wide)
    refused = problem(response, 429)
    assert "7003 tokens are queued and the request brings 998; the limit is 8000" in refused.detail
    assert int(response.headers["retry-after"]) >= 1
    assert metric(strict.url, 'teacher_rejected_total{reason="overloaded"}') >= 1


def test_a_client_who_leaves_frees_the_queue_and_the_model(strict):
    left = metric(strict.url, LEFT)
    with long_generation(strict.url):
        pass
    until(lambda: metric(strict.url, LEFT) == left + 1)  # at the deadline it would be a 504
    assert metric(strict.url, "teacher_queued_tokens") == 0
    # The model thread is free too: behind 7,000 tokens this would take the deadline's 504.
    assert httpx.post(f"{strict.url}/v1/score", json=SHORT, timeout=10).status_code == 200


@only("vllm")
def test_a_client_who_leaves_ends_the_engines_request(strict):
    """Not only the answer is dropped: vLLM decodes no more of its 7,000 tokens."""

    def running():
        return engine_metric(strict.url, "num_requests_running")

    def idle():
        # The gauge moves with the engine's steps, so give it one; from a client with room left.
        with client_at(2) as another:
            assert another.post(f"{strict.url}/v1/score", json=SHORT).status_code == 200
        return running() == 0

    left = metric(strict.url, LEFT)
    before = engine_metric(strict.url, "generation_tokens_total")
    with long_generation(strict.url):
        until(lambda: running() == 1)
        assert not idle()
    until(lambda: metric(strict.url, LEFT) == left + 1)
    until(idle)
    assert engine_metric(strict.url, "generation_tokens_total") < before + 7_000


def test_a_late_answer_is_given_up_and_its_work_cancelled(strict):
    response = httpx.post(f"{strict.url}/v1/generate", json=LONG, timeout=20)
    assert "not answered within 5 s" in problem(response, 504).detail
    # Behind the rest of its 7,000 tokens this would take the deadline's 504.
    assert httpx.post(f"{strict.url}/v1/score", json=SHORT, timeout=10).status_code == 200


@only("transformers")
def test_scoring_waits_for_one_generation_at_most(long_folder, backend):
    """Two queues take turns: a score is answered between the batches of many generations."""
    generation = {"max_new_tokens": 120, "temperature": 0.0}
    with running_server(long_folder, "--backend", backend, "--max-batch-tokens", "150") as url:
        done = []

        def generate(token):
            asked = {**generation, "prompts": [[5, 6, token]]}
            assert httpx.post(f"{url}/v1/generate", json=asked, timeout=60).status_code == 200
            done.append(True)

        clients = [threading.Thread(target=generate, args=[7 + i]) for i in range(8)]
        for client in clients:
            client.start()
        until(lambda: metric(url, "teacher_queued_jobs") == 8)
        assert httpx.post(f"{url}/v1/score", json=SHORT, timeout=60).status_code == 200
        finished_before = len(done)
        for client in clients:
            client.join()
    assert len(done) == 8
    assert finished_before <= 4


@only("vllm")
def test_the_engine_takes_clients_in_turns(strict):
    """It runs two sequences at a time: the eight of one client do not all come before another's."""
    asked = {"prompts": [[5, 6, 7]], "max_new_tokens": 40, "temperature": 0.0}
    done = []

    def generate(client, n):
        with client_at({"flood": 1, "another": 2}[client]) as http:
            answer = http.post(f"{strict.url}/v1/generate", json={**asked, "n": n})
        done.append(client)
        return answer.status_code

    flood = threading.Thread(target=generate, args=["flood", 8])
    flood.start()
    until(lambda: metric(strict.url, "teacher_queued_jobs") == 8)
    assert generate("another", 1) == 200
    flood.join()  # on a slow machine it is late, and refused
    assert done == ["another", "flood"]


@contextlib.contextmanager
def server_process(folder, tmp_path, *arguments):
    """(process, address, log) of a server that may still be loading."""
    port, log = free_port(), tmp_path / "log"
    server = start_server(folder, *arguments, port=port, log=log, command_line=True)
    try:
        yield server, f"http://127.0.0.1:{port}", log
    finally:
        server.kill()
        server.wait()


def test_while_the_model_loads_the_server_is_alive_not_ready_and_free_to_go(long_folder, tmp_path):
    with server_process(long_folder, tmp_path) as (server, url, log):
        address = ("127.0.0.1", int(url.rsplit(":", 1)[1]))
        until(lambda: socket.socket().connect_ex(address) == 0)
        assert httpx.get(f"{url}/health").status_code == 200
        assert "loading" in problem(httpx.get(f"{url}/ready"), 503).detail
        refused = httpx.post(f"{url}/v1/score", json=SHORT)
        assert problem(refused, 503).title == "Unavailable"
        assert int(refused.headers["retry-after"]) >= 1
        server.send_signal(signal.SIGINT)
        assert server.wait(20) == 0, log.read_text()
        assert "Ready" not in log.read_text()


@only("vllm")
def test_an_engine_whose_model_loads_does_not_outlive_a_server_that_is_killed(
    long_folder, backend, tmp_path
):
    with server_process(long_folder, tmp_path, "--backend", backend) as (server, _, log):
        until(lambda: "Starting to load model" in log.read_text(), 200)
        family = psutil.Process(server.pid).children(recursive=True)
        assert len(family) >= 3  # the engine, its worker and multiprocessing's own
        server.kill()
        server.wait()
        assert psutil.wait_procs(family, timeout=30)[1] == []


def test_a_generation_that_outlasts_the_drain_does_not_hold_the_process(long_folder, tmp_path):
    with server_process(long_folder, tmp_path, "--drain-timeout", "1") as (server, url, log):
        wait_until_ready(server, url, log)
        with long_generation(url):
            server.send_signal(signal.SIGTERM)
            assert server.wait(6) == 0, log.read_text()
    assert "it/s]" not in log.read_text()  # no progress bar, which is for terminals


def test_a_port_in_use_is_refused_before_the_model_loads(strict, tmp_path):
    port, log = int(strict.url.rsplit(":", 1)[1]), tmp_path / "log"
    server = start_server(strict.folder, port=port, log=log, command_line=True)
    assert server.wait(300) == 2
    assert "Backend:" not in log.read_text()
    assert f"cannot listen on 127.0.0.1 port {port}: Address already in use" in log.read_text()
    assert httpx.get(f"{strict.url}/health").status_code == 200

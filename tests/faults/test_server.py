"""The faults of a teacher server, each by really causing it; the page on reliability lists them."""

import contextlib
import resource
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import psutil
import pytest
import torch

from shared import codec, wire
from shared.protocol import Problem
from teacher_server.app import TeacherApp
from teacher_server.limits.auth import ApiKeys
from teacher_server.metrics import Metrics
from teacher_server.settings import Settings
from tests.support.engine import Engine
from tests.support.http import client_at, metric, until
from tests.support.models import save_model, save_tokenizer
from tests.support.reference import load_model
from tests.support.server import free_port, serving, start_server, wait_until_ready

RANDOM = np.random.default_rng(0)
BROKEN = 7  # a token whose embedding is not finite


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Wide between its layers, so that memory goes there; and one row of its weights is broken."""
    folder = tmp_path_factory.mktemp("llama")
    save_tokenizer(folder)
    save_model(folder, intermediate_size=2048, max_position_embeddings=8192)
    model = load_model(folder)
    with torch.no_grad():
        model.model.embed_tokens.weight[BROKEN] = torch.nan
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    """(address, process) of a server whose batches are small."""
    port, log = free_port(), tmp_path_factory.mktemp("server") / "log"
    process = start_server(
        folder, "--max-batch-tokens", "8192", "--max-queued-tokens", "100000",
        "--max-request-tokens", "100000", port=port, log=log,
    )  # fmt: skip
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until_ready(process, url, log)
        yield url, psutil.Process(process.pid)
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def app(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    made = TeacherApp(Settings(str(tmp_path), request_timeout=20.0), Metrics(), ApiKeys(()))
    made.ready(Engine())
    return made


def texts(count, length):
    """Sequences that nobody asked for before: equal ones that are under way are computed once."""
    return RANDOM.integers(10, 250, (count, length)).tolist()


def score(url, sequences, *, rows=1, top_k=2, client=1):
    """Answer to a request that scores the last ``rows`` tokens of each of ``sequences``.

    ``client`` is the number of the address that it comes from.
    """
    asked = [
        {"token_ids": np.array(ids, np.uint32), "completion_start": len(ids) - rows}
        for ids in sequences
    ]
    with client_at(client) as http:
        return http.post(
            f"{url}/v1/score", content=codec.encode({"sequences": asked, "top_k": top_k}),
            headers={"content-type": wire.MSGPACK_MEDIA_TYPE},
        )  # fmt: skip


def problem(response, status):
    assert response.status_code == status, response.text[:300]
    return Problem.model_validate(response.json())


def connect(url, client=1):
    host, port = url.removeprefix("http://").split(":")
    address = (f"127.0.0.{client}", 0)
    return socket.create_connection((host, int(port)), timeout=20, source_address=address)


def begin(url, path, headers, body=b"", client=1):
    """A connection on which a request was begun by hand."""
    connection = connect(url, client)
    head = f"POST {path} HTTP/1.1\r\nHost: t\r\nContent-Type: {wire.MSGPACK_MEDIA_TYPE}\r\n"
    connection.sendall(head.encode() + headers + b"\r\n" + body)
    return connection


def test_a_client_that_floods_neither_fills_the_queue_nor_goes_first(server):
    url, _ = server
    done, order = threading.Lock(), []

    def flood(_):
        response = score(url, texts(16, 256), client=2)
        with done:
            order.append(response.status_code)

    with ThreadPoolExecutor(30) as clients:
        sent = [clients.submit(flood, n) for n in range(30)]
        until(lambda: 429 in order)  # it has all that it is given
        response = score(url, texts(16, 256), client=3)
        answered_before = order.count(200)
        for one in sent:
            one.result()
    assert response.status_code == 200
    assert order.count(200) >= 10
    # Behind the batch that ran, and perhaps one more.
    assert order.count(200) - answered_before >= 4


def leave_free(process, size):
    """Let a process take `size` bytes of address space more than it holds now."""
    limit = process.memory_info().vms + size
    process.rlimit(psutil.RLIMIT_AS, (limit, resource.RLIM_INFINITY))


def test_a_batch_that_exceeds_the_memory_is_split_and_answered(server):
    """The process may take 32 MiB more; 8,000 tokens, together or alone, want 125 in a layer."""
    url, process = server
    score(url, texts(1, 500))
    batches = metric(url, 'teacher_batch_size_count{kind="score"}')
    runs = metric(url, 'teacher_model_seconds_count{kind="score"}')
    try:
        leave_free(process, 32 << 20)
        assert score(url, texts(16, 500)).status_code == 200
        assert metric(url, 'teacher_batch_size_count{kind="score"}') == batches + 1
        assert metric(url, 'teacher_model_seconds_count{kind="score"}') >= runs + 3
        # The failed batch gave memory back to the system, so the limit is set anew.
        leave_free(process, 32 << 20)
        refused = problem(score(url, [*texts(1, 100), *texts(1, 8000)]), 413)
    finally:
        process.rlimit(psutil.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert refused.field == "sequences.1"
    assert "8000 tokens do not fit the teacher's memory" in refused.detail
    assert score(url, texts(1, 8000)).status_code == 200


def test_a_model_that_fails_on_one_sequence_fails_its_request_alone(server):
    url, _ = server
    with ThreadPoolExecutor(9) as clients:
        held = clients.submit(score, url, texts(64, 256))  # while it runs, the others queue up
        until(lambda: metric(url, "teacher_queued_jobs") == 64)
        good = [clients.submit(score, url, [[5, 6, n]]) for n in range(10, 17)]
        bad = clients.submit(score, url, [[5, 6, 5], [5, BROKEN, 5]])
        assert [one.result().status_code for one in (held, *good)] == [200] * 8
        refused = problem(bad.result(), 500)
    assert refused.field == "sequences.1"
    assert "not finite" in refused.detail


def test_a_busy_server_is_alive(server):
    url, _ = server
    with ThreadPoolExecutor(20) as clients:
        busy = [clients.submit(score, url, texts(16, 256)) for _ in range(20)]
        until(lambda: metric(url, "teacher_queued_jobs") >= 100)
        for _ in range(20):
            assert httpx.get(f"{url}/health", timeout=5).status_code == 200
        assert metric(url, "teacher_queued_jobs") > 0
        for one in busy:
            one.result()


def test_headers_without_end_take_no_memory(server):
    url, process = server
    before = process.memory_info().rss
    with connect(url) as connection, contextlib.suppress(OSError):
        connection.sendall(b"GET /health HTTP/1.1\r\nX: ")
        sent = 0
        while sent < 64 << 20:
            connection.sendall(b"x" * (64 << 10))
            sent += 64 << 10
    assert sent < 60 << 20  # it hung up
    assert process.memory_info().rss - before < 16 << 20


def test_bodies_that_never_end_are_bounded_together(app):
    app.admission.bytes.limit = 1 << 20
    with serving(app) as url, contextlib.ExitStack() as stack:
        for number in range(6):
            declared = b"Content-Length: 200000\r\n"
            stack.enter_context(begin(url, "/v1/score", declared, b"x" * 1000, 10 + number))
        until(lambda: metric(url, "teacher_held_bytes") >= 1_000_000)
        response = score(url, [[5, 6]] * 1000, client=3)
        assert "bytes are queued" in problem(response, 429).detail
        assert int(response.headers["retry-after"]) >= 1
        chunked = b"Transfer-Encoding: chunked\r\n"
        undeclared = stack.enter_context(begin(url, "/v1/score", chunked, client=20))
        undeclared.sendall(b"10000\r\n" + b"x" * 0x10000 + b"\r\n")
        assert b" 429 " in undeclared.recv(100)
        stack.close()
        until(lambda: metric(url, "teacher_held_bytes") == 0)
        assert score(url, [[5, 6]] * 1000, client=3).status_code == 200


def test_answers_that_nobody_reads_are_bounded_together(app):
    sequences = [[5] * 64] * 1000  # 50 MB of zeros, and as much again while they are packed
    asked = [{"token_ids": np.array(ids, np.uint32), "completion_start": 1} for ids in sequences]
    body = codec.encode({"sequences": asked, "top_k": 100})
    length = b"Content-Length: %d\r\n" % len(body)
    app.admission.bytes.limit = 150 << 20
    with serving(app) as url:
        with begin(url, "/v1/score", length, body):
            until(lambda: metric(url, "teacher_held_bytes") > 90 << 20)
            until(lambda: metric(url, "teacher_queued_tokens") == 0)  # answered, and unread
            refused = score(url, sequences, rows=63, top_k=100, client=3)
            assert "bytes are queued" in problem(refused, 429).detail
        until(lambda: metric(url, "teacher_held_bytes") == 0)
        assert score(url, sequences, rows=63, top_k=100, client=3).status_code == 200


def test_a_caller_who_never_reads_is_hung_up_on(app):
    app.admission.request_timeout = 0.5
    asked = {"token_ids": np.full(64, 5, np.uint32), "completion_start": 1}
    body = codec.encode({"sequences": [asked] * 400, "top_k": 100})
    with serving(app) as url:
        length = b"Content-Length: %d\r\n" % len(body)
        with begin(url, "/v1/score", length, body):
            until(lambda: metric(url, "teacher_held_bytes") > 0)
            until(lambda: metric(url, "teacher_held_bytes") == 0)


@pytest.mark.slow_fault
def test_a_flood_of_bodies_does_not_fill_the_memory(folder, tmp_path):
    """2 GB are sent in 50 bodies that never end, to a server that may hold 576 MiB."""
    port, log = free_port(), tmp_path / "log"
    process = start_server(folder, "--max-held-mib", "576", port=port, log=log)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until_ready(process, url, log)
        resident = psutil.Process(process.pid).memory_info
        before = resident().rss
        with contextlib.ExitStack() as stack:
            for number in range(50):
                headers = b"Content-Length: 60000000\r\n"
                connection = stack.enter_context(
                    begin(url, "/v1/score", headers, client=10 + number)
                )
                with contextlib.suppress(OSError):  # refused
                    connection.sendall(bytes(40_000_000))
            assert metric(url, 'teacher_rejected_total{reason="overloaded"}') >= 40
            assert resident().rss - before < 700 << 20
        until(lambda: metric(url, "teacher_held_bytes") == 0)
        assert score(url, [[5, 6]]).status_code == 200
    finally:
        process.kill()
        process.wait()

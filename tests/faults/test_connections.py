"""Connections of strangers: halves of heads, crumbs of bodies, contradicting lengths."""

import contextlib
import socket
import time

import httpx
import pytest

from teacher_server.app import TeacherApp
from teacher_server.http import protocol as http_protocol
from teacher_server.limits.auth import ApiKeys
from teacher_server.metrics import Metrics
from teacher_server.settings import Settings
from tests.support.engine import Engine
from tests.support.models import save_model, save_tokenizer
from tests.support.server import free_port, serving, start_server, wait_until_ready

HEAD = b"POST /v1/score HTTP/1.1\r\nHost: t\r\nContent-Type: application/json\r\n"
BODY = b'{"sequences":[{"token_ids":[5,6],"completion_start":1}],"top_k":1}'
DESCRIPTORS = 256


@pytest.fixture
def url(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    app = TeacherApp(Settings(str(tmp_path), request_timeout=20.0), Metrics(), ApiKeys(()))
    app.ready(Engine())
    with serving(app) as url:
        yield url


def connect(url):
    host, port = url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=20)


def answer(connection):
    """All that comes until the server hangs up."""
    got = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := connection.recv(1 << 16):
            got += piece
    return got


def chunked(body, size):
    pieces = [body[i : i + size] for i in range(0, len(body), size)]
    return b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["length first", "length last"])
def test_two_lengths_of_a_body_are_refused_and_the_connection_closed(url, order):
    both = b"Content-Length: %d\r\n" % len(BODY), b"Transfer-Encoding: chunked\r\n"
    with connect(url) as connection:
        heads = b"".join(both[i] for i in order)
        connection.sendall(HEAD + heads + b"\r\n" + chunked(BODY, 1000))
        assert b" 400 " in answer(connection).split(b"\r\n")[0]


def test_a_body_in_crumbs_is_refused_and_one_in_pieces_is_not(url):
    head = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
    with connect(url) as connection:
        connection.sendall(head + chunked(b" " * 30_000 + BODY, 1))
        assert b" 400 " in answer(connection).split(b"\r\n")[0]
    with connect(url) as connection:
        connection.sendall(head.replace(b"Host", b"Connection: close\r\nHost")
                           + chunked(b" " * 30_000 + BODY, 100))  # fmt: skip
        assert b" 200 " in answer(connection).split(b"\r\n")[0]


@pytest.mark.parametrize("sent", [b"", HEAD, BODY[:5]], ids=["nothing", "half", "nonsense"])
def test_a_head_that_does_not_end_is_hung_up_on(url, monkeypatch, sent):
    monkeypatch.setattr(http_protocol, "HEAD_SECONDS", 0.5)
    with connect(url) as connection:
        since = time.monotonic()
        connection.sendall(sent)
        answer(connection)
        assert time.monotonic() - since < 5


def test_the_second_head_of_a_connection_has_to_end_as_well(url, monkeypatch):
    monkeypatch.setattr(http_protocol, "HEAD_SECONDS", 0.5)
    with connect(url) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: t\r\n\r\n")
        assert b" 200 " in connection.recv(1 << 16)
        time.sleep(1)  # idle connections are kept longer
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: t\r\n\r\n" + HEAD)
        assert b" 200 " in answer(connection)


def test_half_sent_heads_at_the_limit_of_descriptors_stop_nobody(tmp_path):
    folder = tmp_path / "model"
    save_tokenizer(folder)
    save_model(folder)
    port, log = free_port(), tmp_path / "log"
    shell = f'ulimit -n {DESCRIPTORS}; exec "$@"'
    process = start_server(folder, port=port, log=log, launcher=("sh", "-c", shell, "sh"))
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until_ready(process, url, log)
        with contextlib.ExitStack() as stack:
            for _ in range(300):
                connection = stack.enter_context(connect(url))
                with contextlib.suppress(OSError):  # one that was closed for a newcomer
                    connection.sendall(HEAD)
            for _ in range(5):
                since = time.monotonic()
                assert httpx.get(f"{url}/health", timeout=10).status_code == 200
                assert time.monotonic() - since < 3
            response = httpx.post(f"{url}/v1/score", content=BODY, timeout=10, headers={
                "content-type": "application/json"})  # fmt: skip
            assert response.status_code == 200
            time.sleep(2)
        text = log.read_text()
        assert "Traceback" not in text
        assert text.count("No descriptor is free") <= 1
    finally:
        process.kill()
        process.wait()

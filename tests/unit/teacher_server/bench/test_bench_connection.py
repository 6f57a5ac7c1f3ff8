"""A request is measured until its whole answer is there, and no longer than it may take."""

import http.client
import time

import pytest

from teacher_server.bench.connection import Address, Connection
from tests.support.stub import serving


class Dripping:
    """A server whose answers come in ten pieces, so much apart."""

    seconds = 0.0

    def get(self, path):
        def pieces():
            for _ in range(10):
                time.sleep(self.seconds)
                yield b"x"

        return 200, {}, pieces()


def test_an_answer_that_drips_does_not_outlast_the_timeout():
    stub = Dripping()
    stub.seconds = 0.2
    with serving(stub) as url:
        connection = Connection(Address.parse(url, None, 0.5))
        since = time.perf_counter()
        with pytest.raises(TimeoutError, match=r"no whole answer within 0\.5 s"):
            connection.ask("GET", "/drip")
        assert time.perf_counter() - since < 1.5
        stub.seconds = 0.0
        assert connection.ask("GET", "/drip") == (200, b"x" * 10)  # the next one is not cut
        time.sleep(0.6)
        assert connection.ask("GET", "/drip") == (200, b"x" * 10)
        connection.close()


def test_nobody_there_is_no_timeout():
    connection = Connection(Address.parse("http://127.0.0.1:9", None, 0.5))
    with pytest.raises((OSError, http.client.HTTPException)) as caught:
        connection.ask("GET", "/")
    assert not isinstance(caught.value, TimeoutError)

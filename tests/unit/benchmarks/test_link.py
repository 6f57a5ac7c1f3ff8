"""The imitated wire: a request takes a round trip, and large answers what rate and windows cost."""

import time

import httpx
import pytest

from benchmarks.link import link
from tests.support import stub


class Sized:
    def get(self, path):
        return 200, {}, bytes(int(path.removeprefix("/")))


@pytest.mark.parametrize(("size", "rate", "least"), [(10, 1e9, 0.1), (250_000, 2e7, 0.1 + 0.1)])
def test_an_answer_arrives_after_a_round_trip_and_its_bytes(size, rate, least):
    wire = {"round_trip": 0.1, "bits_per_second": rate}
    with stub.serving(Sized()) as near, link(near, **wire) as far, httpx.Client() as client:
        client.get(f"{far}/1")  # the handshake
        since = time.perf_counter()
        assert len(client.get(f"{far}/{size}").content) == size
        assert time.perf_counter() - since >= least


def test_a_quiet_connection_starts_slowly_again():
    """14.6 kB, then twice as much each round trip: 100 kB take three."""
    wire = {"round_trip": 0.05, "bits_per_second": 1e9}
    with stub.serving(Sized()) as near, link(near, **wire) as far, httpx.Client() as client:
        client.get(f"{far}/1")
        time.sleep(0.25)
        since = time.perf_counter()
        client.get(f"{far}/100000")
        assert time.perf_counter() - since >= 3 * 0.05

"""Networks that lose packets, fall apart or are slow: the kernel's own, in a namespace."""

import contextlib
import logging
import os
from dataclasses import dataclass

import numpy as np
import pytest

from benchmarks.link import link
from shared.errors import TeacherUnreachableError
from shared.protocol import ScoreSequence
from student_trainer.teacher.base import ScoreOptions
from student_trainer.teacher.sparse_gkd import SparseGkdTeacher
from tests.support import stub, stub_process
from tests.support.http import until
from tests.support.namespaces import command, skipped_where_forbidden
from tests.support.paced import PacedTeacher, scores_of

# Tests that change the network run one after another.
pytestmark = pytest.mark.xdist_group("networks")

PORT = 8000
RNG = np.random.default_rng(0)
SEQUENCES = [(RNG.integers(0, 100, 2000).astype(np.uint32), 4) for _ in range(8)]
K = 64


def assert_right(scores):
    for (ids, start), found in zip(SEQUENCES, scores, strict=True):
        expected = scores_of(ScoreSequence(token_ids=ids, completion_start=start), 100, K)
        np.testing.assert_array_equal(found.logprobs, expected.logprobs)
        np.testing.assert_array_equal(found.next_token_logprob, expected.next_token_logprob)


@dataclass(frozen=True)
class Wire:
    """A teacher in a network namespace, behind a pair of virtual interfaces."""

    namespace: str
    url: str

    def filter(self, *rule):
        """Add a rule of the packet filter to what comes in there, or with ``-F`` drop all."""
        command("ip", "netns", "exec", self.namespace, "iptables", *rule)

    def loses_packets(self):
        """One in twelve, by chance."""
        chance = ("-m", "statistic", "--mode", "random", "--probability", "0.08")
        self.filter("-A", "INPUT", *chance, "-j", "DROP")

    def falls_apart(self):
        """Silently: no packet arrives, and nobody is told."""
        for chain in ("INPUT", "OUTPUT"):
            self.filter("-A", chain, "-j", "DROP")

    def heals(self):
        self.filter("-F")


@contextlib.contextmanager
def machine(folder, seconds=0.0):
    """The `Wire` to a new machine, always at the same address, whose teacher takes its time."""
    namespace, outer, inner = (f"{name}{os.getpid()}" for name in ("gkd", "gkdo", "gkdi"))
    near, far = "10.213.77.1", "10.213.77.2"
    with contextlib.ExitStack() as life:
        with skipped_where_forbidden():
            command("ip", "netns", "add", namespace)
            life.callback(command, "ip", "netns", "del", namespace)
            command("ip", "link", "add", outer, "type", "veth", "peer", inner, "netns", namespace)
            # Of a namespace that is deleted the kernel takes interfaces away a while later.
            life.callback(command, "ip", "link", "del", outer)
            command("ip", "address", "add", f"{near}/30", "dev", outer)
            command("ip", "link", "set", outer, "up")
            command("ip", "-n", namespace, "address", "add", f"{far}/30", "dev", inner)
            command("ip", "-n", namespace, "link", "set", inner, "up")
            chance = ("-m", "statistic", "--mode", "random", "--probability", "0")
            Wire(namespace, "").filter("-A", "INPUT", *chance, "-j", "DROP")
            Wire(namespace, "").heals()
        launcher = ("ip", "netns", "exec", namespace)
        life.enter_context(
            stub_process.running(PORT, stub.info(), folder, seconds, host=far, launcher=launcher)
        )
        yield Wire(namespace, f"http://{far}:{PORT}")


@pytest.fixture
def wire(tmp_path):
    with machine(tmp_path) as wire:
        yield wire


@pytest.mark.slow_fault
def test_lost_packets_cost_time_only(wire):
    wire.loses_packets()
    with SparseGkdTeacher([wire.url], timeout=60) as client:
        client.connect()
        for _ in range(5):
            assert_right(client.score(SEQUENCES, ScoreOptions(K)))


@pytest.mark.slow_fault
def test_a_network_that_falls_apart_and_heals_costs_time_only(wire, caplog):
    with caplog.at_level(logging.WARNING), SparseGkdTeacher([wire.url], timeout=60) as client:
        client.connect()
        wire.falls_apart()
        call = client.submit(client.score, SEQUENCES, ScoreOptions(K))
        with pytest.raises(TimeoutError):
            call.result(1.5)
        wire.heals()
        assert_right(call.result(60))


@pytest.mark.slow_fault
def test_a_machine_that_is_lost_and_replaced_is_asked_again_long_before_the_timeout(
    tmp_path, monkeypatch
):
    """No packet ends the connections to the first one, and the second knows nothing of them."""
    seconds = {"TCP_KEEPIDLE": 1, "TCP_KEEPINTVL": 1, "TCP_KEEPCNT": 3}
    monkeypatch.setattr("student_trainer.teacher.transport._KEEPALIVE", seconds)
    with contextlib.ExitStack() as life:
        with machine(tmp_path, seconds=120) as wire:
            client = life.enter_context(SparseGkdTeacher([wire.url], timeout=300))
            client.connect()
            call = client.submit(client.score, SEQUENCES, ScoreOptions(K))
            with pytest.raises(TimeoutError):
                call.result(0.5)
            wire.falls_apart()
        with machine(tmp_path):
            assert_right(call.result(30))


@pytest.mark.slow_fault
def test_a_replica_out_of_reach_is_left_out_and_rejoins(wire, caplog):
    with (
        stub.serving(PacedTeacher(stub.info(), lambda tokens: 0.0)) as other,
        caplog.at_level(logging.WARNING),
        SparseGkdTeacher([wire.url, other], timeout=4) as client,
    ):
        client.connect()
        wire.falls_apart()
        for _ in range(2):  # idle replicas take turns: it is asked once at least
            assert_right(client.score(SEQUENCES, ScoreOptions(K)))
        assert f"{wire.url} is left out" in caplog.text
        wire.heals()
        until(lambda: f"{wire.url} is back" in caplog.text)


@pytest.mark.slow_fault
def test_a_network_apart_for_good_is_named_after_the_timeout(wire, monkeypatch):
    monkeypatch.setattr("student_trainer.teacher.http._READY_TIMEOUT", 0.3)
    with SparseGkdTeacher([wire.url], timeout=1) as client:
        client.connect()
        wire.falls_apart()
        with pytest.raises(TeacherUnreachableError, match=f"{wire.url} within 1 s"):
            client.score(SEQUENCES, ScoreOptions(K))


def test_a_long_and_narrow_wire_costs_time_only():
    """150 ms there and back, 40 Mbit/s, with TCP's slow start; imitated, so without privileges."""
    with (
        stub.serving(PacedTeacher(stub.info(), lambda tokens: 0.0)) as near,
        link(near, round_trip=0.15, bits_per_second=4e7) as far,
        SparseGkdTeacher([far], timeout=60) as client,
    ):
        client.connect()
        first = client.score(SEQUENCES[:2], ScoreOptions(K))
        assert_right(first + client.score(SEQUENCES[2:], ScoreOptions(K)))

"""The addresses at which the members of a transfer over gloo reach each other."""

import os
import re
import sys
import threading
import time

import pytest
import torch

from tests.support import forked
from tests.support.namespaces import enter, switched
from tests.support.server import free_port
from tests.support.vllm import VLLM

pytestmark = VLLM
INTERFACES, SECONDS = "GLOO_SOCKET_IFNAME", 4.0


@pytest.fixture
def gloo():
    from student_trainer.rollouts import gloo

    return gloo


@pytest.fixture
def devices(gloo, monkeypatch):
    """The devices of a process whose trainer is at an address, by what they were asked for."""
    monkeypatch.setattr(gloo.dist.ProcessGroupGloo, "create_device", lambda **asked: asked)
    return lambda address: gloo._devices(gloo.GlooInitInfo(address, 1, 1, 2, 1.0))


def test_a_member_is_reached_by_the_way_it_reaches_the_trainer(gloo, devices, monkeypatch):
    monkeypatch.delenv(INTERFACES, raising=False)
    assert devices("127.0.0.1") == [{"hostname": "127.0.0.1"}]
    ways = {"10.1.0.1": "10.1.0.7", "fd00::1": "fd00::7"}

    class Datagrams(gloo.socket.socket):
        def connect(self, place):
            self.host = place[0]

        def getsockname(self):
            return ways[self.host], 1

    monkeypatch.setattr(gloo.socket, "socket", Datagrams)
    for address, own in ways.items():
        assert devices(address) == [{"hostname": own}]


def test_interfaces_that_are_named_are_taken(devices, monkeypatch):
    monkeypatch.setenv(INTERFACES, "ib0,ib1")
    assert devices("127.0.0.1") == [{"interface": "ib0"}, {"interface": "ib1"}]


def test_weights_cross_loopback(gloo):
    info = gloo.GlooInitInfo("127.0.0.1", free_port(), 1, world_size=2, seconds=20)
    weights = [torch.full((3,), 7.0), torch.zeros(3)]

    def take_part(rank):
        gloo._Group(info, rank).broadcast(weights[rank]).wait()

    members = [threading.Thread(target=take_part, args=(rank,)) for rank in range(2)]
    for member in members:
        member.start()
    for member in members:
        member.join()
    assert weights[1].tolist() == [7.0] * 3


@pytest.fixture
def join_from_two_hosts(tmp_path):
    """Let two members join from hosts of their own; return their exit codes and what they said."""

    def join(**environment):
        variables = {name: value for name, value in os.environ.items() if name != INTERFACES}
        with switched(2) as nodes:
            logs = [tmp_path / node.namespace for node in nodes]
            members = [
                forked.start(
                    take_part, [node.namespace, nodes[0].address, str(rank)], log,
                    environment={**variables, **environment}, preloaded=forked.PRELOADED_VLLM,
                )
                for rank, (node, log) in enumerate(zip(nodes, logs, strict=True))
            ]  # fmt: skip
            codes = [member.wait(120) for member in members]
        return codes, [log.read_text() for log in logs]

    return join


def take_part(argv):
    """Receive weights, or send them, in a namespace."""
    from student_trainer.rollouts.gloo import GlooInitInfo, _Group

    namespace, address, rank = argv
    enter(namespace)
    began = time.monotonic()
    try:
        group = _Group(GlooInitInfo(address, 29700, 1, world_size=2, seconds=SECONDS), int(rank))
    except RuntimeError:
        sys.stdout.write(f"given up after {time.monotonic() - began:.1f} s")
        return 1
    weight = torch.full((3,), 7.0 if rank == "0" else 0.0)
    group.broadcast(weight).wait()
    sys.stdout.write(str(weight.tolist()))
    return 0


@pytest.mark.slow_fault
@pytest.mark.xdist_group("networks")
def test_weights_reach_another_host_whatever_this_ones_name_resolves_to(join_from_two_hosts):
    codes, said = join_from_two_hosts()
    assert codes == [0, 0]
    assert all("[7.0, 7.0, 7.0]" in one for one in said)


@pytest.mark.slow_fault
@pytest.mark.xdist_group("networks")
def test_a_member_that_nobody_connects_to_gives_up_in_time(join_from_two_hosts):
    """Gloo by itself would wait five times as long."""
    codes, said = join_from_two_hosts(**{INTERFACES: "lo"})
    assert codes == [1, 1]
    waited = [float(re.search(r"given up after (.*) s", one)[1]) for one in said]
    assert max(waited) < 2 * SECONDS

"""The network namespaces of this machine, as nodes on one switch."""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Node:
    """A namespace with an address of its own; its interface is called ``eth0``.

    Attributes:
        switch: namespace of the switch.
        port: the switch's interface to this node.
    """

    namespace: str
    address: str
    switch: str
    port: str

    @property
    def launcher(self) -> tuple[str, ...]:
        """The beginning of a command line that runs in the namespace.

        The node has a host name of its own, which resolves nowhere.
        """
        named = ("unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', self.namespace)
        return ("ip", "netns", "exec", self.namespace, *named)

    def unplug(self) -> None:
        """Take the node off the network; nobody is told."""
        command("ip", "-n", self.switch, "link", "set", self.port, "down")

    def plug_in(self) -> None:
        """Undo `unplug`."""
        command("ip", "-n", self.switch, "link", "set", self.port, "up")


def enter(namespace: str) -> None:
    """Move this thread, and those that it starts from now on, to a namespace."""
    with Path("/run/netns", namespace).open() as place:
        if ctypes.CDLL(None, use_errno=True).setns(place.fileno(), 0):
            raise OSError(ctypes.get_errno(), f"cannot enter {namespace}")


def command(*argv: str) -> None:
    subprocess.run(argv, check=True, capture_output=True, text=True)


@contextlib.contextmanager
def skipped_where_forbidden() -> Iterator[None]:
    """Skip the test where namespaces cannot be made, which needs root and `ip`."""
    try:
        yield
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", "") or error
        pytest.skip(f"network namespaces are not permitted here: {reason}")


@contextlib.contextmanager
def switched(count: int) -> Iterator[list[Node]]:
    """Yield the nodes of `network`, or skip the test."""
    with contextlib.ExitStack() as life:
        with skipped_where_forbidden():
            nodes = life.enter_context(network(count))
        yield nodes


@contextlib.contextmanager
def network(count: int) -> Iterator[list[Node]]:
    """Yield ``count`` nodes that reach each other, and nothing else.

    Raises:
        OSError, subprocess.CalledProcessError: namespaces cannot be made.
    """
    switch = f"gkds{os.getpid()}"
    nodes = [
        Node(f"gkdn{i}-{os.getpid()}", f"10.213.78.{i + 1}", switch, f"port{i}")
        for i in range(count)
    ]
    with contextlib.ExitStack() as life:

        def namespace(name: str) -> None:
            command("ip", "netns", "add", name)
            life.callback(command, "ip", "netns", "del", name)
            command("ip", "-n", name, "link", "set", "lo", "up")

        namespace(switch)
        command("ip", "-n", switch, "link", "add", "bridge", "type", "bridge")
        command("ip", "-n", switch, "link", "set", "bridge", "up")
        for node in nodes:
            name, port = node.namespace, node.port
            namespace(name)
            command(
                "ip", "-n", switch, "link", "add", port, "type", "veth",
                "peer", "eth0", "netns", name,
            )  # fmt: skip
            command("ip", "-n", switch, "link", "set", port, "master", "bridge", "up")
            command("ip", "-n", name, "address", "add", f"{node.address}/24", "dev", "eth0")
            command("ip", "-n", name, "link", "set", "eth0", "up")
        yield nodes

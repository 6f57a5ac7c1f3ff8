"""The network namespaces of this machine, as nodes on one switch."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

import pytest


@dataclass(frozen=True)
class Node:
    """A namespace with an address of its own; its interface is called ``eth0``."""

    namespace: str
    address: str

    @property
    def launcher(self) -> tuple[str, ...]:
        """The beginning of a command line that runs in the namespace."""
        return ("ip", "netns", "exec", self.namespace)


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
    """Yield ``count`` nodes that reach each other, and nothing else."""
    switch = f"gkds{os.getpid()}"
    nodes = [Node(f"gkdn{i}-{os.getpid()}", f"10.213.78.{i + 1}") for i in range(count)]
    with contextlib.ExitStack() as life:

        def namespace(name: str) -> None:
            command("ip", "netns", "add", name)
            life.callback(command, "ip", "netns", "del", name)
            command("ip", "-n", name, "link", "set", "lo", "up")

        with skipped_where_forbidden():
            namespace(switch)
            command("ip", "-n", switch, "link", "add", "bridge", "type", "bridge")
            command("ip", "-n", switch, "link", "set", "bridge", "up")
            for i, node in enumerate(nodes):
                name, port = node.namespace, f"port{i}"
                namespace(name)
                command(
                    "ip", "-n", switch, "link", "add", port, "type", "veth",
                    "peer", "eth0", "netns", name,
                )  # fmt: skip
                command("ip", "-n", switch, "link", "set", port, "master", "bridge", "up")
                command("ip", "-n", name, "address", "add", f"{node.address}/24", "dev", "eth0")
                command("ip", "-n", name, "link", "set", "eth0", "up")
        yield nodes

"""The measurements that all parts share: time and memory on a device, and rows of figures."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator

import torch

from benchmarks.harness import Figure

Row = dict[str, Figure]
Rows = Iterator[Row]
MIB = 1 << 20


def median_seconds(
    step: Callable[[], object], device: str, *, budget: float = 1.0, most: int = 20
) -> float:
    """Return the median time of a step after two to warm up, three times at least.

    Args:
        budget: seconds after which no further step begins.
        most: steps at most.
    """
    for _ in range(2 if device == "cuda" else 1):
        step()
    wait(device)
    taken: list[float] = []
    began = time.perf_counter()
    while len(taken) < 3 or (len(taken) < most and time.perf_counter() - began < budget):
        before = time.perf_counter()
        step()
        wait(device)
        taken.append(time.perf_counter() - before)
    return statistics.median(taken)


def peak_mib(step: Callable[[], object], device: str) -> int | None:
    """Return by how much a step raises the allocated memory at most, in MiB; None on a CPU."""
    if device != "cuda":
        step()
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) // MIB


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def milliseconds(seconds: float) -> float:
    return round(1e3 * seconds, 3)


def ratio(one: float, other: float) -> float:
    return round(one / other, 3)

"""The least time of each kernel on paper: bytes that it must move, and products it must sum.

    from benchmarks.gpu_parts.roofline import H200, fused_loss

A kernel takes at least as long as the slower of the two, and kernels run one after another.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    """A card's limits, from its data sheet.

    Attributes:
        bandwidth: of its memory, in bytes a second.
        flops: of bfloat16 matrix products, dense, in operations a second.
    """

    bandwidth: float
    flops: float


H200 = Card(4.8e12, 989e12)
# By a part of the name that torch gives; the longer one first where one holds the other.
CARDS = {
    "H200": H200,
    "H100": Card(3.35e12, 989e12),
    "A100": Card(2.04e12, 312e12),
    "B200": Card(8.0e12, 2250e12),
}


@dataclass(frozen=True)
class Work:
    """The work of one kernel.

    Attributes:
        moved: bytes from and to memory, each operand once.
        flops: operations of matrix products; other arithmetic is hidden behind memory.
    """

    moved: float
    flops: float = 0.0

    def seconds(self, card: Card) -> float:
        return max(self.moved / card.bandwidth, self.flops / card.flops)


def card_named(name: str) -> Card:
    """Return the limits of the card that torch calls ``name``; those of an H200 if unknown."""
    return next((card for part, card in CARDS.items() if part in name), H200)


def divergence(
    positions: int, vocab_size: int, support: int, *, logits: int = 4, gradient: int = 2
) -> Work:
    """Return the work of the loss kernel: logits are read twice and the gradient is written.

    Args:
        logits, gradient: bytes of a number of theirs; ``gradient`` 0 writes none and reads once.
    """
    passes = 2 * logits + gradient if gradient else logits
    scattered = 32 * 2  # a sector of memory for each logit and each gradient of the support
    return Work(positions * (vocab_size * passes + support * (8 + 4 + scattered)))


def project(positions: int, vocab_size: int, width: int, *, logits: int = 4) -> Work:
    """Return the work of logits [n, V] = states [n, d] @ weightᵀ, of half-precision factors."""
    factors = 2 * width * (positions + vocab_size)
    flops = 2.0 * positions * vocab_size * width
    return Work(factors + logits * positions * vocab_size, flops)


def states_gradient(positions: int, vocab_size: int, width: int) -> Work:
    """Return the work of gradient [n, V] @ weight [V, d]."""
    moved = 2 * (positions * vocab_size + vocab_size * width + positions * width)
    return Work(moved, 2.0 * positions * vocab_size * width)


def weight_gradient(
    positions: int, vocab_size: int, width: int, *, first: bool, sums: int = 4
) -> Work:
    """Return the work of adding gradientᵀ [V, n] @ states [n, d] to the sum [V, d].

    Args:
        first: the sum is written and not read.
        sums: bytes of a number of the sum.
    """
    moved = 2 * positions * (vocab_size + width) + (1 if first else 2) * sums * vocab_size * width
    return Work(moved, 2.0 * positions * vocab_size * width)


def fused_loss(
    positions: int, vocab_size: int, width: int, *, support: int, chunk: int, trained: bool
) -> list[Work]:
    """Return the kernels of the fused loss, forward and backward, chunk by chunk."""
    works = []
    for first in range(0, positions, chunk):
        n = min(chunk, positions - first)
        works += [
            project(n, vocab_size, width),
            divergence(n, vocab_size, support),
            states_gradient(n, vocab_size, width),
        ]
        if trained:
            works.append(weight_gradient(n, vocab_size, width, first=first == 0))
    if trained:  # scaled by what comes from above, and rounded
        works.append(Work(6 * vocab_size * width))
    works.append(Work(4 * positions * width))
    return works


def bare_matmuls(positions: int, vocab_size: int, width: int, *, trained: bool) -> list[Work]:
    """Return the products that no such loss can do without, at once and in half precision."""
    works = [
        project(positions, vocab_size, width, logits=2),
        states_gradient(positions, vocab_size, width),
    ]
    if trained:
        works.append(weight_gradient(positions, vocab_size, width, first=True, sums=2))
    return works


def seconds(works: Iterable[Work], card: Card) -> float:
    return sum(work.seconds(card) for work in works)

"""The size of the chunks in which the fused loss projects positions to logits."""

from __future__ import annotations

import math

import torch

# On a CPU. Each chunk reads and writes the whole weight gradient, so a chunk needs hundreds of
# positions: at V = 152k, d = 512 on 2 cores, 165 of them (96 MiB) cost 16 % over the bare matmuls,
# 441 cost 7 %.
CHUNK_BYTES = 256 << 20
# A GPU computes about 200 products in the time in which it moves a byte, so the weight gradient's
# 8·V·d bytes a chunk cost 275 / n of the matmuls' time (H200): 62 % at 441 positions, 7 % at 4,096.
TRAINED_BYTES = 2 << 30
MOST_POSITIONS = 4096
# With a frozen output layer the matmuls alone set the size: they are as fast from 1,000 positions.
FROZEN_BYTES = 512 << 20
# A chunk and its gradient in half precision take at most a sixteenth of the card.
_SHARE = 16 * 1.5


def chunk_bytes(card: int | None, *, trained: bool) -> int:
    """Return the most bytes of float32 logits in a chunk.

    Args:
        card: bytes of the GPU's memory; None for a CPU.
        trained: the output layer gets a gradient.
    """
    if card is None:
        return CHUNK_BYTES
    most = TRAINED_BYTES if trained else FROZEN_BYTES
    return max(min(most, int(card / _SHARE)), min(most, CHUNK_BYTES))


def chunk_positions(count: int, vocab_size: int, card: int | None, *, trained: bool) -> int:
    """Return the size of the fewest equal chunks within `chunk_bytes`, so that no chunk is small.

    Args:
        count: positions of the micro-batch.
        vocab_size: logits of a position.
        card, trained: as in `chunk_bytes`.
    """
    limit = chunk_bytes(card, trained=trained) // (4 * vocab_size)
    if card is not None:
        limit = min(limit, MOST_POSITIONS)
    chunks = max(1, math.ceil(count / max(1, limit)))
    return max(1, math.ceil(count / chunks))


def card_bytes(device: torch.device) -> int | None:
    """Return the memory of a GPU in bytes, all of it and not what is free; None for a CPU.

    It must not depend on what else lies there, because another chunk size gives other bits.
    """
    if device.type != "cuda":
        return None
    return int(torch.cuda.get_device_properties(device).total_memory)

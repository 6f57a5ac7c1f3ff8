"""Draw random numbers that depend on what is sampled, not on where.

One uniform per generated token, from a counter-based generator keyed by content: the same seed
gives the same completion whatever the batch, the rank or the device it is sampled on.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray


def uniforms(*key: int | bytes | str, count: int) -> NDArray[np.float64]:
    """Return ``count`` uniforms in [0, 1), float64 [count], fixed by ``key``.

    A longer stream begins with the shorter one. Source: Philox 4x64 (Salmon et al., SC 2011),
    keyed by SHA-256 of the key's parts, each preceded by its length.
    """
    return np.random.Generator(_philox(*key)).random(count)


def uniform_rows(*key: int | bytes | str, first: int, rows: int, width: int) -> NDArray[np.float64]:
    """Return rows ``first`` and following of an endless table of uniforms, float64 [rows, width].

    A row depends on ``key``, its number and ``width`` alone; rows before ``first`` cost nothing.
    """
    counts = -(-width // 4)  # the generator makes four numbers of each count
    bits = _philox(*key)
    bits.advance(first * counts)
    return np.random.Generator(bits).random((rows, 4 * counts))[:, :width]


def _philox(*key: int | bytes | str) -> np.random.Philox:
    digest = hashlib.sha256()
    for part in key:
        data = part if isinstance(part, bytes) else str(part).encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    words = np.frombuffer(digest.digest()[:16], dtype="<u8")
    return np.random.Philox(key=words)

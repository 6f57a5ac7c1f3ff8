"""Random numbers that depend on what is sampled, not on where.

One uniform per generated token, from a counter-based generator keyed by content: the same seed
gives the same completion whatever the batch, the rank or the device it is sampled on.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray


def uniforms(*key: int | bytes | str, count: int) -> NDArray[np.float64]:
    """``count`` uniforms in [0, 1), float64 [count], fixed by ``key``.

    A longer stream begins with the shorter one. Source: Philox 4x64 (Salmon et al., SC 2011),
    keyed by SHA-256 of the key's parts, each preceded by its length.
    """
    digest = hashlib.sha256()
    for part in key:
        data = part if isinstance(part, bytes) else str(part).encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    words = np.frombuffer(digest.digest()[:16], dtype="<u8")
    return np.random.Generator(np.random.Philox(key=words)).random(count)

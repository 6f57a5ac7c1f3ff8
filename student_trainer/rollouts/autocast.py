"""The half-precision copies of weights that autocast makes, kept from one token to the next."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch


@contextmanager
def casts_kept(keep: bool) -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """Keep the half-precision copies of weights that autocast makes, for the whole block.

    Autocast (``--bf16``) drops them when its outermost block ends, and the model's own call is one:
    at every token all weights would be converted again. No training pass may find them, because
    the optimizer changes weights; and in some releases a copy made without gradients gives none.

    Yields:
        A function whose block is outside, without the copies.
    """

    @contextmanager
    def dropped() -> Iterator[None]:
        if not keep:
            yield
            return
        torch.autocast_decrement_nesting()
        torch.clear_autocast_cache()
        try:
            yield
        finally:
            torch.autocast_increment_nesting()

    if not keep:
        yield dropped
        return
    torch.autocast_increment_nesting()
    try:
        yield dropped
    finally:
        torch.autocast_decrement_nesting()
        torch.clear_autocast_cache()

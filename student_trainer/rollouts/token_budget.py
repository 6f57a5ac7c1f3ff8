"""The bound on the tokens that a process has open at its rollout servers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from shared.errors import RolloutError


class TokenBudget:
    """A number of tokens that requests share, first come, first served.

    A large request waits until there is room for it, and those that came later wait behind it, so
    that small ones never pass it for ever.

    Args:
        most: tokens at once; None for no bound.
    """

    def __init__(self, most: int | None) -> None:
        self._most = most
        self._free = most or 0
        self._turn = asyncio.Lock()  # which is fair
        self._freed = asyncio.Condition()

    @asynccontextmanager
    async def hold(self, tokens: int) -> AsyncIterator[None]:
        """Hold so many tokens within the block, once they are free.

        Raises:
            RolloutError: they are more than the bound.
        """
        if self._most is None:
            yield
            return
        if tokens > self._most:
            raise RolloutError(
                f"a prompt and its completion have up to {tokens} tokens, and this process may "
                f"have {self._most} in flight; raise --rollout_max_tokens_in_flight"
            )
        async with self._turn, self._freed:
            await self._freed.wait_for(lambda: self._free >= tokens)
            self._free -= tokens
        try:
            yield
        finally:
            async with self._freed:
                self._free += tokens
                self._freed.notify_all()

"""A deadline whose error says what was waited for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager


@asynccontextmanager
async def within(seconds: float, late: Callable[[], Exception]) -> AsyncIterator[None]:
    """Raises ``late()`` when what is inside takes longer; a TimeoutError of its own passes through."""
    scope = asyncio.timeout(seconds)
    try:
        async with scope:
            yield
    except TimeoutError as error:
        if not scope.expired():
            raise
        raise late() from error

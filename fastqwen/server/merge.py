"""Several generations of one request at once; when one fails or the client leaves, all of them end."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


async def gather(works: Sequence[Coroutine[Any, Any, Any]]) -> None:
    """Like asyncio.gather, but a failure cancels the others before it is raised."""
    tasks = [asyncio.create_task(work) for work in works]
    try:
        await asyncio.gather(*tasks)
    finally:
        await _cancel(tasks)


async def merge(sources: Sequence[AsyncIterator[T]]) -> AsyncIterator[tuple[int, T]]:
    """(index of the source, item) in the order in which items come."""
    if len(sources) == 1:
        async with contextlib.aclosing(sources[0]) as source:  # type: ignore[type-var]
            async for item in source:
                yield 0, item
        return
    queue: asyncio.Queue[tuple[int, T] | Exception | None] = asyncio.Queue()

    async def pump(index: int, source: AsyncIterator[T]) -> None:
        try:
            async with contextlib.aclosing(source) as open_source:  # type: ignore[type-var]
                async for item in open_source:
                    queue.put_nowait((index, item))
            queue.put_nowait(None)
        except Exception as error:
            queue.put_nowait(error)

    tasks = [asyncio.create_task(pump(index, source)) for index, source in enumerate(sources)]
    try:
        remaining = len(tasks)
        while remaining:
            found = await queue.get()
            if found is None:
                remaining -= 1
            elif isinstance(found, Exception):
                raise found
            else:
                yield found
    finally:
        await _cancel(tasks)


async def _cancel(tasks: Sequence[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)

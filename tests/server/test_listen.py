"""The server's own end: a request that it cancels is a broken connection, not a bug in the log."""

from __future__ import annotations

import asyncio

import pytest
from starlette.types import Message, Receive, Scope, Send

from fastqwen.server.http.listen import _ends_with_the_server


async def _receive() -> Message:
    raise AssertionError("nothing is read")


async def _send(message: Message) -> None:
    raise AssertionError("nothing is sent")


def test_a_request_that_the_servers_end_cancels_raises_nothing():
    async def endless(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(60)

    async def main() -> None:
        task = asyncio.ensure_future(_ends_with_the_server(endless)({}, _receive, _send))
        await asyncio.sleep(0)
        task.cancel()
        await task

    asyncio.run(main())


def test_a_bug_is_still_one():
    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        asyncio.run(_ends_with_the_server(broken)({}, _receive, _send))

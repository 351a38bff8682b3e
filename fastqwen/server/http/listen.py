"""A port, an event loop and uvicorn: drain on the first signal, abort on the second."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sys
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from fastqwen.errors import BadConfig
from fastqwen.server.config import FrontConfig
from fastqwen.server.http.access_log import AccessLog
from fastqwen.server.http.door import Door
from fastqwen.server.http.header_limits import bounded_http

log = logging.getLogger("fastqwen.server")

Result = TypeVar("Result")


def bind(host: str, port: int) -> socket.socket:
    """A listening socket, before anything is loaded. Raises BadConfig that names address and port."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
        bound.listen(2048)
    except OSError as error:
        bound.close()
        raise BadConfig(
            f"cannot listen on {host} port {port}: {error.strerror}; use --port to choose another"
        ) from None
    bound.setblocking(False)
    return bound


def address_of(config: FrontConfig, bound: socket.socket) -> str:
    """What to open in a browser on this machine; an address that means all of them is none to open."""
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(config.host, config.host)  # noqa: S104 nothing is bound here
    return f"http://{f'[{host}]' if ':' in host and host[0] != '[' else host}:{bound.getsockname()[1]}"


def run_loop(main: Coroutine[Any, Any, Result]) -> Result:
    """On uvloop where there is one: a token costs a process half as much."""
    if sys.platform == "win32":
        return asyncio.run(main)
    import uvloop

    return uvloop.run(main)


def _ends_with_the_server(app: ASGIApp) -> ASGIApp:
    """Only the end of the server cancels a request from outside: a broken connection then, not a bug with a traceback."""

    async def call(scope: Scope, receive: Receive, send: Send) -> None:
        with suppress(asyncio.CancelledError):
            await app(scope, receive, send)

    return call


class DrainingServer(uvicorn.Server):
    """uvicorn, but the first signal lets running requests finish while new ones are told to go elsewhere."""

    def __init__(self, app: ASGIApp, state: Door) -> None:
        self._state = state
        super().__init__(
            uvicorn.Config(
                _ends_with_the_server(AccessLog(app, writes=state.config.access_log)),
                log_level="info",
                access_log=False,  # uvicorn writes its line when an answer begins, and knows nothing of its tokens
                log_config=None,
                http=bounded_http(state.config),
                ws="none",
                lifespan="off",
                limit_concurrency=None,
                timeout_graceful_shutdown=2,
                timeout_keep_alive=30,
                server_header=False,
            )
        )

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal)
        try:
            yield
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)

    def _on_signal(self) -> None:
        if self._state.draining:
            log.info("second signal: running requests are aborted")
            self.should_exit = self.force_exit = True
            return
        self._state.draining = True
        if self._state.num_active:
            log.info("finishing %d running requests; a second signal aborts them", self._state.num_active)
        self._drain_task = asyncio.get_running_loop().create_task(self._drain())

    async def _drain(self) -> None:
        deadline_s = asyncio.get_running_loop().time() + self._state.config.drain_timeout_s
        while self._state.num_active and asyncio.get_running_loop().time() < deadline_s:
            await asyncio.sleep(0.05)
        if self._state.num_active:
            log.warning("%d requests did not finish in time and are aborted", self._state.num_active)
        self.should_exit = True

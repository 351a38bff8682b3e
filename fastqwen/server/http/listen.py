"""A port, an event loop and uvicorn: drain on the first signal, abort on the second."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import ssl
import sys
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
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

ACCEPTED_AT_ONCE = 8  # connections in one round of the event loop


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


@contextmanager
def listening(config: FrontConfig) -> Iterator[socket.socket]:
    """The socket that requests come to, and certificates that can be used. Raises BadConfig."""
    if config.ssl_certfile is not None:
        try:
            uvicorn.config.create_ssl_context(
                **_certificates(config), password=None, ssl_version=ssl.PROTOCOL_TLS_SERVER
            )
        except (OSError, ValueError) as error:  # SSLError is an OSError
            told = getattr(error, "strerror", None) or error
            raise BadConfig(f"--ssl-certfile {config.ssl_certfile} cannot be used: {told}") from None
    if config.uds is None:
        with bind(config.host, config.port) as bound:
            yield bound
        return
    with _bind_path(config.uds) as bound:
        try:
            yield bound
        finally:
            Path(config.uds).unlink(missing_ok=True)


def _certificates(config: FrontConfig) -> dict[str, Any]:
    return {
        "certfile": config.ssl_certfile,
        "keyfile": config.ssl_keyfile,
        "cert_reqs": config.ssl_cert_reqs,
        "ca_certs": config.ssl_ca_certs,
        "ciphers": config.ssl_ciphers,
    }


def _for_uvicorn(config: FrontConfig) -> dict[str, Any]:
    return {f"ssl_{name}": value for name, value in _certificates(config).items()}


def _bind_path(path: str) -> socket.socket:
    """A socket that another server left behind is replaced, one that somebody listens at is not. Raises BadConfig."""
    bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if Path(path).is_socket() and bound.connect_ex(path):
            Path(path).unlink()
        bound.close()
        bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        bound.bind(path)
        bound.listen(2048)
    except OSError as error:
        bound.close()
        raise BadConfig(f"--uds: cannot listen at {path}: {error.strerror or error}") from None
    bound.setblocking(False)
    return bound


def address_of(config: FrontConfig, bound: socket.socket) -> str:
    """What to open in a browser on this machine; an address that means all of them is none to open."""
    if config.uds is not None:
        return f"unix:{config.uds}"
    scheme = "http" if config.ssl_certfile is None else "https"
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(config.host, config.host)  # noqa: S104 nothing is bound here
    return f"{scheme}://{f'[{host}]' if ':' in host and host[0] != '[' else host}:{bound.getsockname()[1]}"


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
                **({} if state.config.ssl_certfile is None else _for_uvicorn(state.config)),
            )
        )

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """uvloop accepts one connection of a listening socket before it looks after all others again: behind some hundred
        that come at once, one would wait for some hundred rounds. So the socket is listened at several times."""
        copies = 0 if sys.platform == "win32" else ACCEPTED_AT_ONCE - 1
        await super().serve([*(sockets or ()), *(one.dup() for one in sockets or () for _ in range(copies))])

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

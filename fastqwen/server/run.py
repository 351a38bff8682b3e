"""``fastqwen serve``: bind first, then load, then serve; drain on the first signal, abort on the second."""

from __future__ import annotations

import asyncio
import logging
import random
import signal
import socket
import sys
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from tqdm import tqdm

from fastqwen.config import EngineConfig
from fastqwen.errors import BadConfig, FastqwenError
from fastqwen.hub import resolve
from fastqwen.ipc.engine_client import ENGINE_COMMAND, EngineClient
from fastqwen.ipc.wire import Ready
from fastqwen.logs import configure_logging
from fastqwen.model_config import ModelConfig
from fastqwen.server.app import create_app
from fastqwen.server.cache_story import CacheStories
from fastqwen.server.exposure import check_exposure
from fastqwen.server.http_limits import bounded_http
from fastqwen.server.metrics import Metrics
from fastqwen.server.state import ServerConfig, ServerState
from fastqwen.text.formats import Formats, derive_formats
from fastqwen.text.load import TextTools, load_text
from fastqwen.text.pool import TextPool
from fastqwen.text.stops import StopToken
from fastqwen.weights.checkpoint import open_checkpoint

log = logging.getLogger("fastqwen.server")


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


def serve(engine_config: EngineConfig, config: ServerConfig, *, engine_command: Sequence[str] = ENGINE_COMMAND) -> int:
    """Runs until a signal. Returns the exit status. Raises FastqwenError for what the user must change."""
    configure_logging(config.log_format)
    check_exposure(config)
    bound = bind(config.host, config.port)
    try:
        path = resolve(
            engine_config.model, revision=engine_config.revision, weights=engine_config.load_format != "dummy"
        )
        model = open_checkpoint(path, with_tensors=False).model
        text = load_text(path, model, engine_config)
        if engine_config.trust_remote_code:
            log.info("--trust-remote-code has no effect: nothing needs it, a checkpoint's code is never run")
        formats = derive_formats(
            text.template,
            tool_call_parser=engine_config.tool_call_parser,
            reasoning_parser=engine_config.reasoning_parser,
        )
        return _run_loop(_serve(_Parts(engine_config, config, path, model, text, formats, engine_command), bound))
    finally:
        bound.close()


def _run_loop(main: Coroutine[Any, Any, int]) -> int:
    """On uvloop where there is one: a token costs the API process half as much."""
    if sys.platform == "win32":
        return asyncio.run(main)
    import uvloop

    return uvloop.run(main)


@dataclass(frozen=True)
class _Parts:
    engine_config: EngineConfig
    config: ServerConfig
    path: Path
    model: ModelConfig
    text: TextTools
    formats: Formats
    engine_command: Sequence[str]


async def _serve(parts: _Parts, bound: socket.socket) -> int:
    config, text = parts.config, parts.text
    address = f"http://{config.host}:{bound.getsockname()[1]}"
    bar = _LoadingBar()

    def on_ready(ready: Ready) -> None:
        bar.close()
        text.tokenizer.limit_length(ready.plan.max_model_len)
        log.info(
            "%s is ready: %s, context %d tokens, KV cache %d tokens. API %s/v1, documentation %s/docs",
            parts.engine_config.served_names[0],
            ready.plan.dtype,
            ready.plan.max_model_len,
            ready.plan.num_blocks * ready.plan.block_size,
            address,
            address,
        )
        for told in _told_about_stops(text.stops, parts.engine_config):
            log.warning("%s", told)
        for line in ready.comparison:
            log.log(logging.WARNING if line.warn else logging.INFO, "memory: %s", line.text)

    engine = EngineClient(
        parts.engine_config,
        parts.path,
        on_loading=bar.update,
        on_ready=on_ready,
        command=parts.engine_command,
        log_format=config.log_format,
    )
    state = _state(parts, engine)
    workers = state.workers
    assert isinstance(workers, TextPool)
    server = _Server(state)
    engine.start()
    starting = asyncio.create_task(_start_workers(workers, engine, server))
    failing = asyncio.create_task(_stop_on_failure(engine, server))
    try:
        await server.serve(sockets=[bound])
    finally:
        failing.cancel()
        starting.cancel()
        await asyncio.gather(failing, starting, return_exceptions=True)
        bar.close()
        await engine.stop()
        await workers.close()
    if engine.failure:
        raise FastqwenError(engine.failure)
    return 0


def _state(parts: _Parts, engine: EngineClient) -> ServerState:
    engine_config, config = parts.engine_config, parts.config
    return ServerState(
        engine=engine,
        engine_config=engine_config,
        text=parts.text,
        formats=parts.formats,
        workers=TextPool(
            engine_config,
            parts.path,
            parts.model,
            num_workers=config.text_workers,
            timeout_s=config.text_timeout_s,
            log_format=config.log_format,
        ),
        config=config,
        metrics=Metrics(engine_config.served_names[0]),
        seeds=random.Random(engine_config.seed),  # noqa: S311 not a secret
        cache_stories=CacheStories(enabled=engine_config.enable_prefix_caching),
    )


def _told_about_stops(stops: list[StopToken], config: EngineConfig) -> list[str]:
    """An answer that nothing ends runs on to max_tokens, and users of such a model see only that."""
    if stops or config.skip_tokenizer_init:
        return []
    return [
        "no token is known that ends an answer, so answers run to their longest: add eos_token_id to the model's "
        "generation_config.json, or name a folder with such a file with --generation-config; /v1/stops shows what was found"
    ]


async def _stop_on_failure(engine: EngineClient, server: _Server) -> None:
    try:
        await engine.wait_ready()
        while engine.state != "failed":
            await asyncio.sleep(1.0)
    except FastqwenError:
        pass
    server.should_exit = True


async def _start_workers(workers: TextPool, engine: EngineClient, server: _Server) -> None:
    try:
        await workers.start()
    except FastqwenError as error:
        engine.failure = str(error)
        server.should_exit = True


class _Server(uvicorn.Server):
    """uvicorn, but the first signal lets running requests finish while new ones are told to go elsewhere."""

    def __init__(self, state: ServerState) -> None:
        self._state = state
        super().__init__(
            uvicorn.Config(
                create_app(state),
                log_level="info",
                access_log=state.config.access_log,
                log_config=None,
                http=bounded_http(state.config.header_timeout_s),
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


class _LoadingBar:
    """Appears on a terminal when loading takes longer than a second."""

    def __init__(self) -> None:
        self._bar: Any = None

    def update(self, done: int, total: int) -> None:
        if self._bar is None:
            self._bar = tqdm(total=total, desc="Loading layers", unit="layer", leave=False, delay=1.0, disable=None)
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

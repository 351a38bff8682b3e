"""``fastqwen serve``: bind first, then load, then serve."""

from __future__ import annotations

import asyncio
import gc
import logging
import random
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fastqwen.client.engine import Ready
from fastqwen.config import EngineConfig
from fastqwen.errors import FastqwenError
from fastqwen.hub import resolve
from fastqwen.ipc.engine_process import ENGINE_COMMAND
from fastqwen.ipc.process_engine import ProcessEngine
from fastqwen.logs import configure_logging
from fastqwen.model_config import ModelConfig
from fastqwen.server.answer.cache_story import CacheStories
from fastqwen.server.answer.metrics import Metrics
from fastqwen.server.answer.state import ServerState
from fastqwen.server.app import create_app
from fastqwen.server.config import ServerConfig
from fastqwen.server.http.exposure import check_exposure
from fastqwen.server.http.listen import DrainingServer, bind, run_loop
from fastqwen.text.formats import Formats, derive_formats
from fastqwen.text.load import TextTools, load_text
from fastqwen.text.pool import TextPool
from fastqwen.text.stops import StopToken
from fastqwen.weights.checkpoint import open_checkpoint

log = logging.getLogger("fastqwen.server")


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
        return run_loop(_serve(_Parts(engine_config, config, path, model, text, formats, engine_command), bound))
    finally:
        bound.close()


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
        gc.collect()
        gc.freeze()  # what was imported and loaded stays: looking through it again would pause every stream
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

    engine = ProcessEngine(
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
    server = DrainingServer(create_app(state), state)
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


def _state(parts: _Parts, engine: ProcessEngine) -> ServerState:
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
        metrics=Metrics(),
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


async def _stop_on_failure(engine: ProcessEngine, server: DrainingServer) -> None:
    try:
        await engine.wait_ready()
        while engine.state != "failed":
            await asyncio.sleep(1.0)
    except FastqwenError:
        pass
    server.should_exit = True


async def _start_workers(workers: TextPool, engine: ProcessEngine, server: DrainingServer) -> None:
    try:
        await workers.start()
    except FastqwenError as error:
        engine.failure = str(error)
        server.should_exit = True


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

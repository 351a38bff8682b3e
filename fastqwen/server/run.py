"""``fastqwen serve``: bind first, then load, then serve."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import random
import socket
import sys
from collections.abc import Sequence
from contextlib import closing, nullcontext
from pathlib import Path

from fastqwen.client.engine import Ready
from fastqwen.client.loading_bar import LoadingBar
from fastqwen.client.running import Running, announced
from fastqwen.config import EngineConfig
from fastqwen.demo import ABOUT
from fastqwen.errors import BadConfig, FastqwenError
from fastqwen.hub import find_checkpoint
from fastqwen.ipc.engine_process import ENGINE_COMMAND
from fastqwen.ipc.process_engine import ProcessEngine
from fastqwen.lifeline import PARENT_VARIABLE, end_with_parent
from fastqwen.logs import configure_logging
from fastqwen.names import DEMO
from fastqwen.server.answer.cache_story import CacheStories
from fastqwen.server.answer.metrics import Metrics
from fastqwen.server.answer.state import ServerState
from fastqwen.server.app import create_app
from fastqwen.server.config import ServerConfig
from fastqwen.server.dialects.checking import CHECKS
from fastqwen.server.http.exposure import check_exposure
from fastqwen.server.http.listen import DrainingServer, address_of, listening, run_loop
from fastqwen.server.mcp import McpTools, read_mcp_file
from fastqwen.text.formats import derive_formats
from fastqwen.text.load import load_text
from fastqwen.text.pool import TextPool

log = logging.getLogger("fastqwen.server")

# An answer that nothing ends runs on to max_tokens, and users of such a model see only that.
NO_STOPS = (
    "no token is known that ends an answer, so answers run to their longest: add eos_token_id to the model's "
    "generation_config.json, or name a folder with such a file with --generation-config; /v1/stops shows what was found"
)


SWITCH_S = 0.0005  # how long the event loop waits for a thread that spells a large answer


def serve(engine_config: EngineConfig, config: ServerConfig, *, engine_command: Sequence[str] = ENGINE_COMMAND) -> int:
    """Runs until a signal. Returns the exit status. Raises FastqwenError for what the user must change."""
    if PARENT_VARIABLE in os.environ:
        end_with_parent()
    sys.setswitchinterval(SWITCH_S)
    configure_logging(config.log_format)
    check_exposure(config)
    mcp = _mcp_tools(config)
    with listening(config) as bound, closing(LoadingBar()) as bar:
        path, model = find_checkpoint(engine_config)
        text = load_text(path, model, engine_config)
        if engine_config.trust_remote_code:
            log.info("--trust-remote-code has no effect: nothing needs it, a checkpoint's code is never run")
        engine = ProcessEngine(
            engine_config,
            path,
            on_loading=bar.update,
            on_ready=lambda ready: _on_ready(ready, state, bar, bound),
            command=engine_command,
            log_format=config.log_format,
        )
        workers = TextPool(
            engine_config,
            path,
            model,
            num_workers=config.text_workers,
            timeout_s=config.text_timeout_s,
            checks=CHECKS,
            log_format=config.log_format,
        )
        state = ServerState(
            engine=engine,
            engine_config=engine_config,
            text=text,
            formats=derive_formats(
                text.template,
                tool_call_parser=engine_config.tool_call_parser,
                reasoning_parser=engine_config.reasoning_parser,
                reasoning_config=engine_config.reasoning_config,
            ),
            workers=workers,
            config=config,
            metrics=Metrics(),
            seeds=random.Random(engine_config.seed),  # noqa: S311 not a secret
            cache_stories=CacheStories(enabled=engine_config.enable_prefix_caching),
            mcp=mcp,
        )
        # What other commands of this machine look for is a port.
        with announced(_note(state, bound)) if config.uds is None else nullcontext():
            return run_loop(_serve(state, engine, workers, bound))


def _note(state: ServerState, bound: socket.socket) -> Running:
    return Running(
        pid=os.getpid(),
        url=address_of(state.config, bound),
        model=state.names[0],
        started_s=state.started_s,
        wants_key=bool(state.config.api_keys),
    )


async def _serve(state: ServerState, engine: ProcessEngine, workers: TextPool, bound: socket.socket) -> int:
    server = DrainingServer(create_app(state), state)
    engine.start()
    starting = asyncio.create_task(_start_workers(workers, engine, server))
    failing = asyncio.create_task(_stop_on_failure(engine, server))
    remembering = asyncio.create_task(state.remember())
    try:
        await server.serve(sockets=[bound])
    finally:
        for task in (failing, starting, remembering):
            task.cancel()
        await asyncio.gather(failing, starting, remembering, return_exceptions=True)
        if state.mcp is not None:
            await state.mcp.close()
        await engine.stop()
        await workers.close()
    if engine.failure:
        raise FastqwenError(engine.failure)
    return 0


def _on_ready(ready: Ready, state: ServerState, bar: LoadingBar, bound: socket.socket) -> None:
    bar.close()
    state.text.tokenizer.limit_length(ready.plan.max_model_len)
    gc.collect()
    gc.freeze()  # what was imported and loaded stays: looking through it again would pause every stream
    address = address_of(state.config, bound)
    log.info(
        "Open %s to chat. %s is ready: %s on %s, context %d tokens, KV cache %d tokens. API %s/v1, documentation %s/docs",
        address,
        state.names[0],
        ready.plan.dtype,
        ready.plan.device,
        ready.plan.max_model_len,
        ready.plan.num_blocks * ready.plan.block_size,
        address,
        address,
    )
    if state.engine_config.model == DEMO:
        log.info("%s", ABOUT)
    if not state.text.stops and not state.engine_config.skip_tokenizer_init:
        log.warning("%s", NO_STOPS)
    for line in ready.comparison:
        log.log(logging.WARNING if line.warn else logging.INFO, "memory: %s", line.text)


def _mcp_tools(config: ServerConfig) -> McpTools | None:
    if config.mcp is None:
        return None
    if config.insecure:
        raise BadConfig("--mcp lets visitors call tools on this machine: give --api-key instead of --insecure")
    return McpTools(read_mcp_file(Path(config.mcp)))


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
    except Exception as error:
        if not isinstance(error, FastqwenError):
            log.exception("starting a process that reads prompts failed")
        engine.failure = " ".join(str(error).split()) or type(error).__name__
        server.should_exit = True

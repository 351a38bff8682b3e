"""What an operator does to a running server, under vLLM's names: let it sleep, wake it up, empty its prefix cache."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, Response

from fastqwen.client.engine import Sleeper
from fastqwen.errors import BadRequest, Overloaded
from fastqwen.server.answer.state import ServerState
from fastqwen.version import __version__

TAGS = ("weights", "kv_cache", "scheduling")
WAIT_S = 0.05
# Of the configs: names of files are nobody's business but the operator's, who has the command line.
HIDDEN = frozenset({"api_keys", "model", "tokenizer", "chat_template", "download_dir", "mcp", "generation_config"})


def add_routes(app: FastAPI, state: ServerState) -> None:
    _add_looks(app, state)
    _add_acts(app, state)


def _add_looks(app: FastAPI, state: ServerState) -> None:
    @app.get("/ping")
    @app.post("/ping")
    async def ping() -> Response:
        """The API process lives."""
        return Response(status_code=200)

    @app.get("/load")
    async def load() -> dict[str, int]:
        """Requests that run or wait."""
        return {"server_load": state.num_active}

    @app.get("/server_info")
    async def server_info() -> dict[str, Any]:
        """How this server was started, and what it planned."""
        ready = state.engine.ready
        return {
            "version": __version__,
            "models": state.names,
            "engine_config": _shown(state.engine_config),
            "server_config": _shown(state.config),
            "plan": None if ready is None else msgspec.to_builtins(ready.plan),
        }

    @app.get("/is_sleeping")
    async def is_sleeping() -> dict[str, bool]:
        return {"is_sleeping": state.engine.state == "asleep"}


def _add_acts(app: FastAPI, state: ServerState) -> None:
    @app.post("/sleep")
    async def sleep(request: Request) -> JSONResponse:
        """Take no requests until /wake_up. ``level`` 0 gives no memory back, 1 (the default) all but the weights, which wait in
        host memory, 2 all. Where requests run it is refused, unless ``mode`` is abort, which ends them, or wait."""
        _check_operator(state)
        level = _one_of(request, "level", ("0", "1", "2"), "1")
        mode = _one_of(request, "mode", ("", "abort", "wait"), "")
        sleeper = _sleeper(state)
        while mode == "wait" and state.num_active:
            await asyncio.sleep(WAIT_S)
        if state.num_active and not mode:
            raise Overloaded(
                f"{state.num_active} requests are running: wait for them, then let the model sleep, or send mode=abort"
            )
        await sleeper.sleep(int(level))
        if level != "0":
            state.num_cache_resets += 1
        return JSONResponse({"status": "sleeping", "level": int(level), "is_sleeping": True})

    @app.post("/wake_up")
    async def wake_up(request: Request) -> JSONResponse:
        """Answers when the engine is ready. All of it wakes, whichever of ``tags`` is asked for first."""
        _check_operator(state)
        tags = request.query_params.getlist("tags") or None
        for tag in tags or ():
            if tag not in TAGS:
                raise BadRequest(f"tags: {tag[:20]!r} is none of {', '.join(TAGS)}", "tags")
        await _sleeper(state).wake_up()
        return JSONResponse({"status": "awake", "tags": tags, "is_sleeping": False})

    @app.post("/reset_prefix_cache")
    async def reset_prefix_cache() -> JSONResponse:
        """No later prompt finds what was computed before; its blocks are given to others when they are needed."""
        _check_operator(state)
        state.num_cache_resets += 1
        return JSONResponse({"success": True})


def _one_of(request: Request, name: str, values: tuple[str, ...], default: str) -> str:
    value = request.query_params.get(name, default)
    if value not in values:
        known = ", ".join(one for one in values if one)
        raise BadRequest(f"{name} is {value[:20]!r}, but must be one of {known}", name)
    return value


def _sleeper(state: ServerState) -> Sleeper:
    if not isinstance(state.engine, Sleeper):
        raise BadRequest("workers of a cluster do not sleep: fastqwen status --drain takes one out")
    return state.engine


def _check_operator(state: ServerState) -> None:
    """Raises HTTPException where anybody could be asking."""
    if state.config.insecure and not state.config.api_keys:
        raise HTTPException(403, "this server is open to all (--insecure): what changes it needs a key (--api-key)")


def _shown(config: msgspec.Struct) -> dict[str, Any]:
    found: dict[str, Any] = msgspec.to_builtins(config)
    return {name: value for name, value in found.items() if name not in HIDDEN}

"""What an operator does to a running server, under vLLM's names: let it sleep, wake it up, empty its prefix cache."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, Response

from fastqwen.client.engine import Sleeper
from fastqwen.errors import BadRequest, Overloaded
from fastqwen.server.answer.state import ServerState
from fastqwen.version import __version__

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
        """End the engine's process, and with it what it holds of the device's memory, until /wake_up."""
        _check_operator(state)
        level = request.query_params.get("level", "1")
        if level not in ("0", "1", "2"):
            raise BadRequest(f"level is {level[:20]!r}, but must be 1 or 2", "level")
        if state.num_active:
            raise Overloaded(f"{state.num_active} requests are running: wait for them, then let the model sleep")
        await _sleeper(state).sleep()
        state.num_cache_resets += 1
        return JSONResponse({"is_sleeping": True})

    @app.post("/wake_up")
    async def wake_up() -> JSONResponse:
        """Start the engine again; answers when it is ready. All of it wakes, whatever ``tags`` say."""
        _check_operator(state)
        await _sleeper(state).wake_up()
        return JSONResponse({"is_sleeping": False})

    @app.post("/reset_prefix_cache")
    async def reset_prefix_cache() -> JSONResponse:
        """No later prompt finds what was computed before; its blocks are given to others when they are needed."""
        _check_operator(state)
        state.num_cache_resets += 1
        return JSONResponse({"success": True})


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

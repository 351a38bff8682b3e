"""What operators and clients look at: models, stop tokens, health, metrics, and figures for the admin page."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from fastqwen.client.engine import Ready
from fastqwen.names import is_hub_name
from fastqwen.server.answer.state import ServerState
from fastqwen.server.operator.planner import Planner
from fastqwen.server.operator.prometheus import MetricsPage
from fastqwen.version import __version__

ENGINE_FIGURES = ("kv_usage", "num_blocks", "num_preemptions", "prefix_queries_tokens", "prefix_hits_tokens")
READY_WITHIN_S = 30.0  # an engine that is silent for longer is not ready


def add_routes(app: FastAPI, state: ServerState) -> None:
    _add_models(app, state)
    _add_health(app, state)
    _add_figures(app, state)


def _add_models(app: FastAPI, state: ServerState) -> None:
    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(state, name) for name in state.names]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        return _model(state, state.model_name(name))

    @app.get("/v1/stops")
    async def stops() -> dict[str, Any]:
        """Which tokens end an answer, and where each of them comes from."""
        return {"object": "list", "data": [msgspec.to_builtins(stop) for stop in state.text.stops]}

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": __version__}


def _model(state: ServerState, name: str) -> dict[str, Any]:
    ready = state.engine.ready
    return {
        "id": name,
        "object": "model",
        "created": int(state.started_s),
        "owned_by": "fastqwen",
        "root": state.engine_config.model
        if is_hub_name(state.engine_config.model)
        else name,  # no path of this machine
        "max_model_len": None if ready is None else ready.plan.max_model_len,
        "default_sampling": state.text.default_sampling,
        # for the page, which offers only what there is
        "thinks": state.formats.reasoning,
        "mcp_tools": state.mcp is not None,
    }


def _add_health(app: FastAPI, state: ServerState) -> None:
    @app.get("/health")
    async def health() -> Response:
        """The API process lives."""
        return Response(status_code=200)

    @app.get("/health/ready")
    async def ready() -> JSONResponse:
        """The engine is loaded and has spoken lately."""
        done, total = state.engine.loading
        body = {"status": state.engine.state, "progress": done / total if total else 0.0, "message": ""}
        if state.draining:
            return JSONResponse({**body, "status": "draining", "message": "the server is shutting down"}, 503)
        if state.engine.state != "ready":
            return JSONResponse({**body, "message": state.why_not_ready()}, 503)
        if state.engine.silent_for_s > READY_WITHIN_S:
            silent = f"the engine has been silent for {state.engine.silent_for_s:.0f} s"
            return JSONResponse({**body, "status": "stuck", "message": silent}, 503)
        return JSONResponse({**body, "progress": 1.0})


def _add_figures(app: FastAPI, state: ServerState) -> None:
    planner = Planner()

    @app.get("/admin/plan")
    async def plan() -> dict[str, Any]:
        """What else this machine could run, with the commands."""
        held_bytes = _figures(state.engine.ready, "measured").get("peak_bytes", 0)
        return {**await planner.found(held_bytes), "serving": state.engine_config.model}

    page = MetricsPage(lambda: [state])

    @app.get("/metrics")
    async def metrics() -> PlainTextResponse:
        return PlainTextResponse(page.text(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/admin/history")
    async def history() -> dict[str, Any]:
        """The last hour."""
        return state.history.as_json()

    @app.get("/admin/data")
    async def figures() -> dict[str, Any]:
        return figures_of(state)


def figures_of(state: ServerState) -> dict[str, Any]:
    """What the operators' page draws."""
    engine, stats = state.engine, state.engine.stats()
    plan = None if engine.ready is None else msgspec.to_builtins(engine.ready.plan)
    return {
        "running": stats.num_running,
        "waiting": stats.num_waiting,
        **{name: getattr(stats, name) for name in ENGINE_FIGURES},
        "prompt_tokens_total": state.metrics.prompt_tokens,
        "generation_tokens_total": state.metrics.generation_tokens,
        "uptime_s": state.uptime_s,
        "model": state.names[0],
        "state": "draining" if state.draining else engine.state,
        "active_requests": state.num_active,
        "engine_restarts": engine.num_restarts,
        "plan": None if plan is None else {**plan, **_figures(engine.ready, "planned")},
        "measured": {
            **_figures(engine.ready, "measured"),
            "num_steps": stats.num_steps,
            "engine_silent_s": engine.silent_for_s,
        },
        "recent_errors": list(state.recent_errors),
    }


FIGURES = {"weights": "weights_bytes", "peak": "peak_bytes", "KV blocks": "num_blocks"}


def _figures(ready: Ready | None, side: str) -> dict[str, int]:
    """The planner's figures or the measured ones, under the plan's names."""
    return {} if ready is None else {FIGURES[line.what]: getattr(line, side) for line in ready.comparison}

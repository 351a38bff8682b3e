"""GET /mcp/tools and POST /mcp/call, if the operator named MCP servers: the page offers their tools and asks before each call."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

from fastapi import FastAPI, Request
from pydantic import Field
from starlette.exceptions import HTTPException

from fastqwen.server.answer.state import ServerState
from fastqwen.server.dialects.body import Body, parse
from fastqwen.server.http.body import read_body
from fastqwen.server.mcp import McpTools


class McpCall(Body):
    name: str = Field(max_length=128)
    arguments: dict[str, Any] = Field(default_factory=dict)


def add_tools(app: FastAPI, state: ServerState, tools: McpTools) -> None:
    @app.get("/mcp/tools")
    async def listed() -> dict[str, Any]:
        return {"tools": await tools.listed()}

    @app.post("/mcp/call")
    async def call(request: Request) -> dict[str, Any]:
        _refuse_other_sites(request)
        asked = parse(McpCall, await read_body(request, state.config))
        return await tools.call(asked.name, asked.arguments)


def _refuse_other_sites(request: Request) -> None:
    """A tool acts: no page of another site may make a browser call one, be its origin allowed to chat or not."""
    origin = request.headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != request.headers.get("host"):
        raise HTTPException(403, "tools are called by this server's own page only")
    if request.headers.get("content-type", "").split(";")[0].strip() != "application/json":
        raise HTTPException(415, "a call of a tool must be application/json")

"""Tools of MCP servers that the operator names: ``serve --mcp FILE``. Off by default.

The file has the form that other programs read: ``{"mcpServers": {"NAME": {"command": "...", "args": [], "env": {}}}}``, or
``{"url": "https://..."}`` for a server that is reached over HTTP. Nothing runs by itself: the page asks for each call.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
from pathlib import Path
from typing import Any, Protocol

import httpx
import msgspec

from fastqwen.errors import BadConfig, BadRequest, UpstreamGone
from fastqwen.server.http.body import joined
from fastqwen.server.http.heads import bound_heads, head_awaited
from fastqwen.version import __version__

PROTOCOL = "2025-03-26"
MAX_MESSAGE_BYTES = 8 * 2**20
MAX_RESULT_CHARS = 200_000
MAX_TOOLS = 128
START_S = 30.0
CALL_S = 120.0
CLOSE_S = 2.0

log = logging.getLogger("fastqwen.server")


class McpServer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One entry of the file: a program to talk to, or an address."""

    command: str = ""
    args: list[str] = []
    env: dict[str, str] = {}
    url: str = ""
    headers: dict[str, str] = {}


class McpFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    mcpServers: dict[str, McpServer]


def read_mcp_file(path: Path) -> dict[str, McpServer]:
    """Raises BadConfig that names the file and what is wrong with it."""
    try:
        found = msgspec.json.decode(path.read_bytes(), type=McpFile).mcpServers
    except (OSError, msgspec.MsgspecError) as error:
        raise BadConfig(f"--mcp {path}: {error}") from None
    for name, server in found.items():
        if not re.fullmatch(r"[a-zA-Z0-9-]{1,40}", name):
            raise BadConfig(f"--mcp {path}: the name {name!r} must be letters, digits and -, at most 40 of them")
        if bool(server.command) == bool(server.url):
            raise BadConfig(f"--mcp {path}: {name} needs either command or url")
        if server.url and not server.url.startswith(("http://", "https://")):
            raise BadConfig(f"--mcp {path}: the url of {name} must begin with http:// or https://")
    return found


class Channel(Protocol):
    """How messages reach a server and its answers come back."""

    async def ask(self, message: dict[str, Any]) -> dict[str, Any]: ...

    async def tell(self, message: dict[str, Any]) -> None: ...

    async def close(self) -> None: ...


ENDED = "the program ended"


class ProgramChannel:
    """A program that reads and writes one JSON message a line."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    async def start(cls, server: McpServer) -> ProgramChannel:
        process = await asyncio.create_subprocess_exec(
            server.command, *server.args,
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
            env={**os.environ, **server.env}, limit=MAX_MESSAGE_BYTES,
        )  # fmt: skip
        return cls(process)

    async def tell(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(msgspec.json.encode(message) + b"\n")
            await self._process.stdin.drain()
        except ConnectionError:
            raise UpstreamGone(ENDED) from None

    async def ask(self, message: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdout is not None
        await self.tell(message)
        while line := await self._process.stdout.readline():
            answer = msgspec.json.decode(line, type=dict[str, Any]) if line.strip() else {}
            if answer.get("id") == message["id"] and "method" not in answer:
                return answer
            if "id" in answer and "method" in answer:  # the server asks us; we offer nothing
                refusal = {"code": -32601, "message": "not supported"}
                await self.tell({"jsonrpc": "2.0", "id": answer["id"], "error": refusal})
        raise UpstreamGone(ENDED)

    async def close(self) -> None:
        if self._process.returncode is None:
            self._process.terminate()
            try:
                await asyncio.wait_for(self._process.wait(), CLOSE_S)
            except TimeoutError:
                self._process.kill()
                await self._process.wait()


class HttpChannel:
    """MCP's "streamable HTTP": each message is a POST, answered with JSON or with a stream of events."""

    def __init__(self, server: McpServer) -> None:
        self._url = server.url
        headers = {"accept-encoding": "identity", **server.headers}
        self._client = bound_heads(httpx.AsyncClient(headers=headers, timeout=CALL_S, follow_redirects=False))
        self._session: dict[str, str] = {}

    async def _post(self, message: dict[str, Any]) -> tuple[str, str]:
        """Content type and text of the answer."""
        headers = {"accept": "application/json, text/event-stream", **self._session}
        request = self._client.build_request("POST", self._url, json=message, headers=headers)
        with head_awaited():
            response = await self._client.send(request, stream=True)
        try:
            if response.status_code >= 300:
                raise UpstreamGone(f"{self._url} answered {response.status_code}")
            if response.headers.get("content-encoding", "identity") != "identity":
                raise UpstreamGone(f"{self._url} sends its answer compressed, which it was not asked for")
            body = await joined(response.aiter_bytes(), MAX_MESSAGE_BYTES)
        finally:
            await response.aclose()
        if body is None:
            raise UpstreamGone(f"{self._url} answered with more than {MAX_MESSAGE_BYTES} bytes")
        if session := response.headers.get("mcp-session-id"):
            self._session = {"mcp-session-id": session}
        return response.headers.get("content-type", ""), body.decode("utf-8", "replace")

    async def tell(self, message: dict[str, Any]) -> None:
        await self._post(message)

    async def ask(self, message: dict[str, Any]) -> dict[str, Any]:
        kind, text = await self._post(message)
        lines = [text]
        if kind.startswith("text/event-stream"):
            lines = [line[5:] for line in text.splitlines() if line.startswith("data:")]
        for line in lines:
            answer = msgspec.json.decode(line.encode(), type=dict[str, Any])
            if answer.get("id") == message["id"]:
                return answer
        raise UpstreamGone(f"{self._url} gave no answer")

    async def close(self) -> None:
        await self._client.aclose()


class McpClient:
    """One server: started when it is first needed, and again if it went away. Calls go one after another."""

    def __init__(self, name: str, server: McpServer) -> None:
        self.name = name
        self._server = server
        self._channel: Channel | None = None
        self._lock = asyncio.Lock()
        self._num_asked = 0

    async def request(self, method: str, params: dict[str, Any], *, timeout_s: float) -> dict[str, Any]:
        """Raises UpstreamGone where the server cannot be used, BadRequest for what it refuses."""
        async with self._lock:
            try:
                return await asyncio.wait_for(self._request(method, params), timeout_s)
            except BadRequest:
                raise
            except TimeoutError:
                await self._drop()
                raise UpstreamGone(f"MCP server {self.name} did not answer within {timeout_s:.0f} s") from None
            except (OSError, ValueError, httpx.HTTPError, msgspec.MsgspecError, RecursionError, UpstreamGone) as error:
                await self._drop()
                raise UpstreamGone(f"MCP server {self.name} cannot be used: {error or type(error).__name__}") from None

    async def _request(self, method: str, params: dict[str, Any]) -> dict[str, Any]:
        if self._channel is None:
            self._channel = (
                await ProgramChannel.start(self._server) if self._server.command else HttpChannel(self._server)
            )
            us = {"name": "fastqwen", "version": __version__}
            await self._ask("initialize", {"protocolVersion": PROTOCOL, "capabilities": {}, "clientInfo": us})
            await self._channel.tell({"jsonrpc": "2.0", "method": "notifications/initialized"})
        return await self._ask(method, params)

    async def _ask(self, method: str, params: dict[str, Any]) -> dict[str, Any]:
        assert self._channel is not None
        self._num_asked += 1
        message = {"jsonrpc": "2.0", "id": self._num_asked, "method": method, "params": params}
        answer = await self._channel.ask(message)
        if "error" in answer:
            raise BadRequest(f"MCP server {self.name}: {(answer['error'] or {}).get('message', 'refused')}"[:500])
        return answer.get("result") or {}

    async def _drop(self) -> None:
        channel, self._channel = self._channel, None
        if channel is not None:
            await channel.close()

    async def close(self) -> None:
        await self._drop()


class McpTools:
    """The tools of all servers, under names that tell them apart: SERVER__TOOL."""

    def __init__(self, servers: dict[str, McpServer]) -> None:
        self._clients = {name: McpClient(name, server) for name, server in servers.items()}

    async def listed(self) -> list[dict[str, Any]]:
        """A server that cannot be asked is named in the log and left out."""
        found = await asyncio.gather(*(self._tools_of(client) for client in self._clients.values()))
        return [tool for tools in found for tool in tools][:MAX_TOOLS]

    async def _tools_of(self, client: McpClient) -> list[dict[str, Any]]:
        try:
            answer = await client.request("tools/list", {}, timeout_s=START_S)
        except (UpstreamGone, BadRequest) as error:
            log.warning("%s", error)
            return []
        return [
            {
                "name": re.sub(r"[^a-zA-Z0-9_.:-]", "_", f"{client.name}__{tool['name']}")[:128],
                "tool": tool["name"],
                "server": client.name,
                "description": str(tool.get("description") or "")[:2000],
                "parameters": tool.get("inputSchema") or {"type": "object"},
            }
            for tool in answer.get("tools") or []
        ]

    async def call(self, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """What the tool said, as text. Raises BadRequest for a tool that is not offered."""
        server = name.split("__", 1)[0]
        client = self._clients.get(server)
        tools = [] if client is None else await self._tools_of(client)
        tool = next((one["tool"] for one in tools if one["name"] == name), None)
        if client is None or tool is None:
            raise BadRequest(f"no MCP server here has the tool {name[:200]!r}", "name")
        answer = await client.request("tools/call", {"name": tool, "arguments": arguments}, timeout_s=CALL_S)
        text = "\n".join(_text_of(part) for part in answer.get("content") or [])
        return {"text": text[:MAX_RESULT_CHARS], "is_error": bool(answer.get("isError"))}

    async def close(self) -> None:
        await asyncio.gather(*(client.close() for client in self._clients.values()))


def _text_of(part: dict[str, Any]) -> str:
    return str(part.get("text", "")) if part.get("type") == "text" else f"[{part.get('type', '?')}, not shown]"

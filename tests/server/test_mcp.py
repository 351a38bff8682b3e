"""Tools of MCP servers: what the file may say, how they are called, and by whom."""

from __future__ import annotations

import asyncio
import gzip
import json
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from fastqwen.errors import BadConfig, UpstreamGone
from fastqwen.server.answer.history import History
from fastqwen.server.config import ServerConfig
from fastqwen.server.mcp import MAX_MESSAGE_BYTES, HttpChannel, McpClient, McpServer, McpTools, read_mcp_file
from fastqwen.server.run import _mcp_tools
from tests.server.harness import client_of, make_state

PROGRAM = McpServer(command=sys.executable, args=["-m", "tests.server.mcp_program"], env={"MCP_TEST": "told"})


def with_tools(use: Callable[[httpx.AsyncClient], Awaitable[Any]], **servers: McpServer) -> Any:
    async def run() -> Any:
        state = make_state()
        state.mcp = McpTools(servers or {"math": PROGRAM})
        try:
            async with client_of(state) as client:
                return await use(client)
        finally:
            await state.mcp.close()

    return asyncio.run(run())


def test_tools_are_listed_and_called_and_a_server_that_ended_starts_again():
    async def use(client: httpx.AsyncClient) -> None:
        tools = (await client.get("/mcp/tools")).json()["tools"]
        assert [tool["name"] for tool in tools] == ["math__add", "math__env", "math__fail", "math__end"]
        assert tools[0]["parameters"]["type"] == "object"

        async def call(name: str, **arguments: Any) -> httpx.Response:
            return await client.post("/mcp/call", json={"name": name, "arguments": arguments})

        assert (await call("math__add", a=2, b=3)).json() == {"text": "5\n[image, not shown]", "is_error": False}
        assert (await call("math__env")).json()["text"].startswith("told")
        assert (await call("math__fail")).json()["is_error"]
        gone = await call("math__end")
        assert gone.status_code == 502 and "math cannot be used: the program ended" in gone.text
        assert (await call("math__add", a=1, b=1)).status_code == 200
        unknown = await call("math__rm")
        assert (unknown.status_code, unknown.json()["error"]["param"]) == (400, "name")

    with_tools(use)


def test_no_other_site_calls_a_tool():
    async def use(client: httpx.AsyncClient) -> None:
        body = json.dumps({"name": "math__add", "arguments": {"a": 1, "b": 1}})
        for headers, status in (
            ({"origin": "https://evil.example", "content-type": "application/json"}, 403),
            ({"origin": "null", "content-type": "application/json"}, 403),
            ({"content-type": "text/plain"}, 415),
            ({"origin": "http://localhost", "content-type": "application/json"}, 200),
        ):
            answer = await client.post("/mcp/call", content=body, headers=headers)
            assert answer.status_code == status, headers

    with_tools(use)


def test_a_server_that_is_not_there_is_left_out_of_the_list():
    async def use(client: httpx.AsyncClient) -> None:
        tools = (await client.get("/mcp/tools")).json()["tools"]
        assert {tool["server"] for tool in tools} == {"math"}

    with_tools(use, gone=McpServer(command="/no/such/program"), math=PROGRAM)


def test_without_the_flag_there_are_no_such_routes():
    async def run() -> None:
        async with client_of(make_state()) as client:
            assert (await client.get("/mcp/tools")).status_code == 404
            assert (await client.post("/mcp/call", json={"name": "x"})).status_code == 404

    asyncio.run(run())


@pytest.mark.parametrize("kind", ["application/json", "text/event-stream"])
def test_a_server_reached_over_http(kind: str):
    def answer(request: httpx.Request) -> httpx.Response:
        message = json.loads(request.content)
        reply = json.dumps(
            {"jsonrpc": "2.0", "id": message["id"], "result": {"session": request.headers.get("mcp-session-id")}}
        )
        text = reply if kind == "application/json" else f"event: message\ndata: {reply}\n\n"
        return httpx.Response(200, text=text, headers={"content-type": kind, "mcp-session-id": "s1"})

    async def run() -> None:
        channel = HttpChannel(McpServer(url="http://tools.example/mcp"))
        channel._client = httpx.AsyncClient(transport=httpx.MockTransport(answer))
        assert (await channel.ask({"jsonrpc": "2.0", "id": 1, "method": "initialize"}))["result"]["session"] is None
        assert (await channel.ask({"jsonrpc": "2.0", "id": 2, "method": "tools/list"}))["result"]["session"] == "s1"
        await channel.close()

    asyncio.run(run())


@pytest.mark.parametrize(
    ("told", "fault"),
    [
        ({"content": b" " * (MAX_MESSAGE_BYTES + 1)}, "more than"),
        ({"content": gzip.compress(b" " * 2**20), "headers": {"content-encoding": "gzip"}}, "compressed"),
        ({"content": b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"}, "cannot be used"),
    ],
    ids=["large", "compressed", "deep"],
)
def test_a_server_over_http_cannot_fill_the_memory(told: dict[str, Any], fault: str):
    async def run() -> None:
        client = McpClient("tools", McpServer(url="http://tools.example/mcp"))
        channel = HttpChannel(McpServer(url="http://tools.example/mcp"))
        channel._client = httpx.AsyncClient(transport=httpx.MockTransport(lambda request: httpx.Response(200, **told)))
        client._channel = channel
        with pytest.raises(UpstreamGone, match=fault):
            await client.request("tools/list", {}, timeout_s=10)

    asyncio.run(run())


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("{", "--mcp .*truncated"),
        ('{"mcpServers": {"a b": {"command": "x"}}}', "the name 'a b'"),
        ('{"mcpServers": {"a": {}}}', "needs either command or url"),
        ('{"mcpServers": {"a": {"command": "x", "url": "http://y"}}}', "needs either command or url"),
        ('{"mcpServers": {"a": {"url": "file:///etc"}}}', "must begin with http"),
        ('{"mcpServers": {"a": {"command": "x", "shell": true}}}', "shell"),
    ],
)
def test_a_file_that_cannot_work_is_refused_by_name(tmp_path: Path, text: str, fault: str):
    path = tmp_path / "mcp.json"
    path.write_text(text)
    with pytest.raises(BadConfig, match=fault):
        read_mcp_file(path)


def test_tools_are_not_given_to_everybody():
    with pytest.raises(BadConfig, match="--insecure"):
        _mcp_tools(ServerConfig(mcp="x.json", insecure=True))
    assert _mcp_tools(ServerConfig()) is None


def test_an_hour_is_kept_and_no_more():
    history = History()
    for i in range(1000):
        history.note(5.0 * i, generated=50 * i, read=10 * i, running=1, waiting=0)
    told = history.as_json()
    assert len(told["generated"]) == len(told["running"]) == 720
    assert set(told["generated"]) == {10.0} and set(told["read"]) == {2.0}

"""Where a server listens: a Unix socket, a port with TLS, behind a proxy's path."""

from __future__ import annotations

import asyncio
import socket
import ssl
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest

from fastqwen.errors import BadConfig
from fastqwen.server.app import create_app
from fastqwen.server.config import ServerConfig
from fastqwen.server.http.exposure import check_exposure
from fastqwen.server.http.listen import DrainingServer, address_of, listening, run_loop
from tests.server.harness import ask, chat, get, make_state

CHAT = "/v1/chat/completions"


def asked(transport: dict[str, Any], **server: Any) -> tuple[str, httpx.Response]:
    """What a real server at its socket answers."""

    async def run() -> tuple[str, httpx.Response]:
        state = make_state(**server)
        engine: Any = state.engine
        running = asyncio.create_task(engine.run())
        with listening(state.config) as bound:
            serving = DrainingServer(create_app(state), state)
            task = asyncio.create_task(serving.serve(sockets=[bound]))
            address = address_of(state.config, bound)
            base = address if "uds" not in server else "http://vllm.sock"  # which no name server knows
            try:
                made = httpx.AsyncHTTPTransport(retries=3, **transport)
                async with httpx.AsyncClient(transport=made, base_url=base, timeout=60) as client:
                    return address, await client.post(CHAT, json=chat())
            finally:
                serving.should_exit = True
                await task
                running.cancel()

    return run_loop(run())


def test_a_unix_socket(tmp_path: Path):
    path = tmp_path / "server.sock"
    left_behind = socket.socket(socket.AF_UNIX)
    left_behind.bind(str(path))
    left_behind.close()
    address, response = asked({"uds": str(path)}, uds=str(path))
    assert response.status_code == 200 and address == f"unix:{path}"
    assert not path.exists()
    check_exposure(ServerConfig(uds=str(path), host="0.0.0.0"))
    with socket.socket(socket.AF_UNIX) as another:
        another.bind(str(path))
        another.listen()
        with pytest.raises(BadConfig, match="--uds"), listening(ServerConfig(uds=str(path))):
            pass
    with pytest.raises(BadConfig, match="--uds"), listening(ServerConfig(uds=str(tmp_path / "no" / "folder"))):
        pass


def test_https(tmp_path: Path):
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)],
        check=True, capture_output=True,
    )  # fmt: skip
    trusted = ssl.create_default_context(cafile=str(certificate))
    files = {"ssl_certfile": str(certificate), "ssl_keyfile": str(key)}
    address, response = asked({"verify": trusted}, port=0, **files)
    assert response.status_code == 200 and address.startswith("https://127.0.0.1:")
    for wrong in ({"ssl_certfile": str(key)}, {"ssl_certfile": str(tmp_path / "none.pem")}):
        with pytest.raises(BadConfig, match="--ssl-certfile"), listening(ServerConfig(port=0, **wrong)):
            pass
    with pytest.raises(BadConfig, match="need --ssl-certfile"):
        ServerConfig(ssl_keyfile=str(key))


def test_a_proxys_path_may_come_along_or_not():
    for path in (CHAT, f"/qwen{CHAT}", "/qwen/chat/completions"):
        assert ask(make_state(root_path="/qwen"), path, chat()).status_code == 200
    state = make_state(root_path="/qwen", api_keys=("secret-key",))
    assert get(state, "/qwen/health").status_code == 200 and get(state, "/qwen/v1/models").status_code == 401
    assert get(make_state(root_path="/qwen"), "/openapi.json").json()["servers"] == [{"url": "/qwen"}]
    assert get(make_state(root_path="/qwen"), "/qwenother/health").status_code == 404
    with pytest.raises(BadConfig, match="begin with a slash"):
        ServerConfig(root_path="qwen")


def test_switches_of_the_template_that_the_operator_sets():
    template = "{{ messages[0].content }}{{ mood }}"
    state = make_state(template=template, default_chat_template_kwargs={"mood": "calm", "nothing": 1})
    for more in ({}, {"chat_template_kwargs": {"mood": "wild"}}):
        found = ask(state, CHAT, {**chat(), **more}).json()
        assert "warnings" not in found
    assert [bytes(one.prompt_token_ids) for one in state.engine.requests] == [b"hicalm", b"hiwild"]
    counted = ask(state, "/tokenize", chat()).json()
    assert counted["count"] == len("hicalm")


def test_usage_at_the_end_of_every_stream():
    told = ask(make_state(enable_force_include_usage=True), CHAT, {**chat(), "stream": True}).text
    assert '"usage":{' in told and '"usage":{' not in ask(make_state(), CHAT, {**chat(), "stream": True}).text

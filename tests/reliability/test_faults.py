"""Processes that die, signals, ports and disks: what was accepted ends, and ends clearly."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import psutil
import pytest

from tests.reliability.load import load
from tests.reliability.server import ROOT, Server, serving
from tests.server.live import LiveServer

MANY = int(os.environ.get("REPEATS", "100"))
REPEATS = [pytest.param(2, id="x2"), pytest.param(MANY, id=f"x{MANY}", marks=pytest.mark.slow)]


async def read_streams(server: Server, count: int, tokens: int) -> list[tuple[str, float]]:
    """(last event, when it came) of each stream."""

    async def one(client: httpx.AsyncClient, index: int) -> tuple[str, float]:
        body = {"prompt": f"p{index}", "max_tokens": tokens, "stream": True, "ignore_eos": True}
        last = ""
        async with client.stream("POST", f"{server.url}/v1/completions", json=body) as response:
            async for line in response.aiter_lines():
                last = line or last
        return last, time.monotonic()

    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=60, limits=limits) as client:
        return list(await asyncio.gather(*(one(client, index) for index in range(count))))


def in_background(work) -> tuple[threading.Thread, list]:
    found: list = []
    thread = threading.Thread(target=lambda: found.append(asyncio.run(work)))
    thread.start()
    return thread, found


def wait_until(condition, timeout_s: float = 20.0) -> None:
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s, "it did not come to pass"
        time.sleep(0.02)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("repeats", REPEATS)
def test_engine_killed_under_32_streams(model: Path, repeats: int):
    with serving(model, step_s=0.01) as server:
        for _ in range(repeats):
            thread, found = in_background(read_streams(server, 32, 4000))
            wait_until(lambda: server.figures()["running"] == 32)
            engine = server.engine
            engine.kill()
            killed_s = time.monotonic()
            wait_until(lambda: httpx.get(f"{server.url}/health/ready").status_code == 503, 1.0)
            thread.join(10)
            for last, ended_s in found[0]:
                assert "error" in json.loads(last.removeprefix("data: "))
                assert ended_s - killed_s < 2.0
            assert server.wait_ready(10.0) < 10.0
            assert not engine.is_running()
            assert httpx.post(f"{server.url}/v1/completions", json={"prompt": "a", "max_tokens": 2}).status_code == 200
        assert server.figures()["engine_restarts"] == repeats


def test_api_killed_takes_everything_with_it(model: Path):
    with serving(model) as server:
        family = psutil.Process(server.process.pid).children(recursive=True)
        assert len(family) >= 2
        server.process.kill()
        server.process.wait()
        wait_until(lambda: not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in family), 5.0)
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{server.url}/health")


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("repeats", REPEATS)
def test_sigterm_lets_50_streams_finish(model: Path, repeats: int):
    for _ in range(repeats):
        with serving(model, step_s=0.01) as server:
            thread, found = in_background(load(server.url, 50, 250))  # long enough that all of them run at once
            wait_until(lambda: server.figures()["running"] == 50)
            server.process.send_signal(signal.SIGTERM)
            time.sleep(0.1)
            refused = httpx.post(f"{server.url}/v1/completions", json={"prompt": "a"})
            assert refused.status_code == 503
            thread.join(30)
            assert found[0]["errors"] == 0
            assert found[0]["tokens"] == 50 * 250
            assert server.process.wait(10) == 0


def test_a_second_signal_aborts(model: Path):
    with serving(model, step_s=0.01) as server:
        thread, found = in_background(load(server.url, 10, 4000))
        wait_until(lambda: server.figures()["running"] == 10)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        assert server.process.poll() is None
        server.process.send_signal(signal.SIGTERM)
        server.process.wait(2)
        thread.join(5)
        assert found[0]["errors"] == 10


def test_a_port_in_use_is_told_before_anything_is_loaded(model: Path):
    with serving(model) as server:
        options = json.dumps({"port": server.port})
        start_s = time.monotonic()
        command = [sys.executable, "-m", "tests.reliability.mock_server", str(model), options]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
        assert run.returncode == 1
        assert str(server.port) in run.stderr
        assert "Traceback" not in run.stderr
        assert time.monotonic() - start_s < 10.0  # interpreter and imports included


def test_a_full_disk_under_the_log_costs_no_request(model: Path):
    with open("/dev/full", "wb") as full, serving(model, log=full) as server:
        for _ in range(20):
            response = httpx.post(f"{server.url}/v1/completions", json={"prompt": "a", "max_tokens": 3})
            assert response.status_code == 200


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_neither_keys_nor_prompts_are_logged_whatever_happens(model: Path, log_format: str):
    key, prompt = "a-secret-that-nobody-sees", "the prompt itself"
    with serving(model, step_s=0.02, log_format=log_format, stall_timeout_s=1.0) as server:
        httpx.get(f"{server.url}/v1/models", headers={"authorization": f"Bearer {key}"})
        httpx.get(f"{server.url}/v1/models", headers={"x-api-key": key})
        post = f"{server.url}/v1/completions"
        httpx.post(post, json={"prompt": prompt, "max_tokens": 1})
        httpx.post(post, json={"prompt": prompt, "temperature": prompt})  # refused
        httpx.post(post, content=f'{{"prompt": "{prompt}')
        thread, found = in_background(read_streams(server, 4, 4000))
        wait_until(lambda: server.figures()["running"] == 4)
        server.engine.kill()  # an engine's death under a request
        thread.join(10)
        assert all("error" in last for last, _ in found[0])
        server.wait_ready(10.0)
        lines = server.log.read_text().splitlines()
    log = "\n".join(lines)
    assert key not in log and prompt not in log and "p0" not in log
    if log_format == "text":
        assert '"POST /v1/completions HTTP/1.1" 200 OK' in log
        assert '"POST /v1/completions HTTP/1.1" 400 Bad Request' in log
        return
    ours = [json.loads(line) for line in lines]  # the other processes' lines, too
    assert {"time", "level", "logger", "message"} <= set.intersection(*(set(one) for one in ours))
    access = [one for one in ours if one["logger"] == "fastqwen.access"]
    assert {(one["method"], one["path"], one["status"]) for one in access} >= {
        ("POST", "/v1/completions", 200), ("POST", "/v1/completions", 400), ("GET", "/v1/models", 200),
    }  # fmt: skip


def test_a_key_from_the_environment_is_in_no_command_line():
    key = "a-secret-that-nobody-sees"
    with LiveServer("demo", "--max-model-len", "512", FASTQWEN_API_KEY=key) as server:
        assert server.http.get("/v1/models").status_code == 401
        assert server.http.get("/v1/models", headers={"authorization": f"Bearer {key}"}).status_code == 200
        family = [server.process.pid, *(one.pid for one in psutil.Process(server.process.pid).children(recursive=True))]
        assert len(family) >= 2
        assert not any(key.encode() in Path(f"/proc/{pid}/cmdline").read_bytes() for pid in family)
        assert key not in server.log

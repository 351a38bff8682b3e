"""Processes that die, signals, ports and disks: what was accepted ends, and ends clearly."""

from __future__ import annotations

import asyncio
import json
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
from tests.reliability.server import ROOT, Server, free_port, serving

REPEATS = [pytest.param(2, id="x2"), pytest.param(100, id="x100", marks=pytest.mark.slow)]


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
            thread, found = in_background(load(server.url, 50, 100))
            wait_until(lambda: server.figures()["running"] == 50)
            server.process.send_signal(signal.SIGTERM)
            time.sleep(0.1)
            refused = httpx.post(f"{server.url}/v1/completions", json={"prompt": "a"})
            assert refused.status_code == 503
            thread.join(30)
            assert found[0]["errors"] == 0
            assert found[0]["tokens"] == 5000
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


def test_the_key_is_neither_logged_nor_needed_in_the_command(model: Path):
    key = "a-secret-that-nobody-sees"
    with serving(model, port=free_port()) as server:
        httpx.get(f"{server.url}/v1/models", headers={"authorization": f"Bearer {key}"})
        httpx.get(f"{server.url}/v1/models", headers={"x-api-key": key})
        httpx.post(f"{server.url}/v1/completions", json={"prompt": "the prompt itself", "max_tokens": 1})
        log = server.log.read_text()
        assert key not in log
        assert "the prompt itself" not in log
        assert '"POST /v1/completions HTTP/1.1" 200 OK' in log

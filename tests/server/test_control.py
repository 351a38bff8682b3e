"""What an operator does to a running server."""

from __future__ import annotations

import asyncio
import time

import pytest

from fastqwen.errors import EngineGone
from tests.client.test_keeper import watched
from tests.engine.fakes import request
from tests.server.harness import ask, chat, get, make_state

CHAT = "/v1/chat/completions"


def test_the_looks():
    state = make_state()
    assert get(state, "/ping").status_code == ask(state, "/ping", {}).status_code == 200
    assert get(state, "/load").json() == {"server_load": 0}
    assert get(state, "/is_sleeping").json() == {"is_sleeping": False}
    found = get(make_state(api_keys=("secret-key",)), "/server_info", authorization="Bearer secret-key")
    assert found.json()["models"] == ["mock"] and "secret-key" not in found.text
    assert get(make_state(api_keys=("secret-key",)), "/server_info").status_code == 401
    assert get(make_state(api_keys=("secret-key",)), "/ping").status_code == 200


def test_a_reset_prefix_cache_helps_nobody():
    state = make_state()
    body = {"prompt": "x" * 100, "max_tokens": 1}

    def cached() -> int:
        found = ask(state, "/v1/completions", body).json()
        return found["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert cached() == 0 and cached() > 0
    assert ask(state, "/reset_prefix_cache", {}).json() == {"success": True}
    assert cached() == 0 and cached() > 0
    assert ask(state, "/sleep", {}).status_code == ask(state, "/wake_up", {}).status_code == 200
    assert cached() == 0 and cached() > 0


@pytest.mark.parametrize("path", ["/sleep", "/wake_up", "/reset_prefix_cache"])
def test_a_server_open_to_all_is_not_changed_by_anybody(path: str):
    assert ask(make_state(insecure=True), path, {}).status_code == 403
    assert ask(make_state(api_keys=("secret-key",)), path, {}).status_code == 401


def test_it_sleeps_when_nothing_runs():
    state = make_state()
    state.num_active = 1
    assert ask(state, "/sleep", {}).status_code == 429
    assert ask(state, "/sleep?mode=abort&level=0", {}).json()["level"] == 0
    state.num_active = 0
    assert ask(state, "/sleep?level=7", {}).json()["error"]["param"] == "level"
    assert ask(state, "/sleep?mode=keep", {}).json()["error"]["param"] == "mode"
    assert ask(state, "/sleep?level=1&mode=wait", {}).json() == {"status": "sleeping", "level": 1, "is_sleeping": True}
    refused = ask(state, CHAT, chat())
    assert refused.status_code == 503 and "wake_up" in refused.json()["error"]["message"]
    assert get(state, "/health/ready").status_code == 503 and get(state, "/health").status_code == 200
    assert ask(state, "/wake_up?tags=everything", {}).json()["error"]["param"] == "tags"
    assert ask(state, "/wake_up?tags=weights", {}).json() == {
        "status": "awake",
        "tags": ["weights"],
        "is_sleeping": False,
    }
    assert ask(state, CHAT, chat()).status_code == 200


def test_an_engines_process_ends_and_another_begins():
    async def run() -> None:
        engine = watched()
        with pytest.raises(EngineGone):
            await engine.sleep()
        engine.start()
        try:
            async with asyncio.timeout(60):
                await engine.wait_ready()
                first = engine._process
                await engine.sleep()
                await asyncio.sleep(0.2)
                assert engine.state == "asleep" and engine._process is first
                with pytest.raises(EngineGone, match="asleep"):
                    engine.stream([])
                await engine.wake_up()
                assert engine.state == "ready" and engine._process is not first and engine.num_restarts == 0
                await engine.sleep()
        finally:
            await engine.stop()

    asyncio.run(run())


@pytest.mark.parametrize("level", [0, 1])
def test_an_engine_that_sleeps_lightly_keeps_its_process(level: int):
    async def run() -> None:
        engine = watched()
        engine.start()
        try:
            async with asyncio.timeout(60):
                await engine.wait_ready()
                first = engine._process
                stream = engine.stream([request("endless", max_tokens=3000)])
                await engine.sleep(level)  # what runs ends
                assert engine.state == "asleep" and engine._process is first
                assert [delta.finish_reason async for deltas in stream for delta in deltas][-1] == "abort"
                asleep_s = time.monotonic()
                while engine.silent_for_s >= time.monotonic() - asleep_s:  # until it shows once that it lives
                    await asyncio.sleep(0.05)
                await engine.wake_up()
                assert engine.state == "ready" and engine._process is first
                [*_, last] = [deltas async for deltas in engine.stream([request("again", max_tokens=3)])]
                assert last[-1].finish_reason == "length" and engine.stats().num_running == 0
                await engine.sleep(level)
                await engine.sleep(2)
                await engine.wake_up()
                assert engine._process is not first and engine.num_restarts == 0
        finally:
            await engine.stop()

    asyncio.run(run())


def test_an_engine_that_dies_in_its_sleep_wakes_up_as_another():
    async def run() -> None:
        engine = watched()
        engine.start()
        try:
            async with asyncio.timeout(60):
                await engine.wait_ready()
                await engine.sleep(1)
                first = engine._process
                assert first is not None and first._process is not None
                first._process.kill()
                await first._process.wait()
                await asyncio.sleep(0.5)
                await engine.wake_up()
                assert engine.state == "ready" and engine._process is not first
        finally:
            await engine.stop()

    asyncio.run(run())


def test_the_figures_that_boards_read():
    state = make_state()
    ask(state, CHAT, {**chat(), "n": 2, "max_tokens": 40})
    told = get(state, "/metrics").text
    for name in ("request_queue_time_seconds", "request_prefill_time_seconds", "request_inference_time_seconds",
                 "request_params_max_tokens", "request_max_num_generation_tokens"):  # fmt: skip
        assert f'vllm:{name}_count{{model_name="mock"}}' in told
    assert 'vllm:request_params_max_tokens_sum{model_name="mock"} 40.0' in told
    assert 'vllm:request_max_num_generation_tokens_sum{model_name="mock"} 6.0' in told
    assert 'vllm:num_requests_waiting_by_reason{model_name="mock",reason="capacity"}' in told

"""Ranks behind the server's own process of the engine: started again when one is lost, and never left behind."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from fastqwen.config import EngineConfig
from fastqwen.ipc.process_engine import ProcessEngine
from fastqwen.records import EngineRequest, Failure, SamplingParams
from tests.models.tiny import make, prompt

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    at = tmp_path_factory.mktemp("ranks")
    make(at, "Qwen2Config", num_hidden_layers=1, max_position_embeddings=8192)
    return at


def engine_of(folder: Path) -> ProcessEngine:
    wishes = {"dtype": "float32", "device": "cpu", "num_threads": 1, "skip_tokenizer_init": True}
    return ProcessEngine(EngineConfig(model=str(folder), tensor_parallel_size=2, **wishes), folder)


def family() -> list[psutil.Process]:
    """The engine's process and its ranks."""
    words = ("fastqwen.ipc.engine_main", "fastqwen.ranks.rank_main")
    return [one for one in psutil.Process().children(recursive=True) if any(word in one.cmdline() for word in words)]


def ranks() -> list[psutil.Process]:
    return [one for one in family() if "fastqwen.ranks.rank_main" in one.cmdline()]


def request(name: str, tokens: int) -> EngineRequest:
    sampling = SamplingParams(temperature=0.0)
    return EngineRequest(
        request_id=name, prompt_token_ids=prompt(5), sampling=sampling, stop_token_ids=[], max_tokens=tokens, seed=0
    )


async def answers(engine: ProcessEngine, names: list[str], tokens: int) -> list[Failure | None]:
    """How each of them ended."""
    found: dict[str, Failure | None] = {}
    async for deltas in engine.stream([request(name, tokens) for name in names]):
        found |= {delta.request_id: delta.error for delta in deltas if delta.finish_reason is not None}
    return [found[name] for name in names]


async def until(condition: Callable[[], bool], within_s: float = 60.0) -> None:
    end_s = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end_s, "it did not come to pass"
        await asyncio.sleep(0.02)


@pytest.fixture(params=[signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def how(request: pytest.FixtureRequest) -> Iterator[int]:
    yield request.param


@pytest.mark.parametrize("victim", [0, 1])
def test_requests_end_with_an_error_and_the_group_starts_again(folder: Path, how: int, victim: int):
    async def story() -> None:
        engine = engine_of(folder)
        engine.start()
        try:
            await engine.wait_ready()
            assert await answers(engine, ["a"], 4) == [None]
            running = asyncio.create_task(answers(engine, [str(index) for index in range(8)], 8000))
            await until(lambda: engine.stats().num_running == 8)
            before = ranks()
            os.kill(before[victim].pid, how)
            hurt_s = time.monotonic()
            ended = await asyncio.wait_for(running, 30)
            assert [failure is not None and failure.kind for failure in ended] == ["gone"] * 8
            assert time.monotonic() - hurt_s < (2.0 if how == signal.SIGKILL else 20.0)
            await until(lambda: engine.state == "ready")
            assert engine.num_restarts == 1 and not any(one.is_running() for one in before)
            assert await answers(engine, ["b"], 4) == [None]
        finally:
            await engine.stop()
        assert not family()

    asyncio.run(story())


def test_an_idle_rank_that_is_lost_is_noticed(folder: Path):
    async def story() -> None:
        engine = engine_of(folder)
        engine.start()
        try:
            await engine.wait_ready()
            ranks()[1].kill()
            await until(lambda: engine.num_restarts == 1, 5.0)
            await until(lambda: engine.state == "ready")
        finally:
            await engine.stop()

    asyncio.run(story())


@pytest.mark.parametrize("stopped", [False, True])
def test_an_engine_that_is_killed_leaves_no_rank(folder: Path, stopped: bool):
    async def story() -> None:
        engine = engine_of(folder)
        engine.start()
        try:
            await engine.wait_ready()
            own = ranks()
            if stopped:
                os.kill(own[1].pid, signal.SIGSTOP)
            [process] = [one for one in family() if one not in own]
            process.kill()
            await until(lambda: not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in own), 3.0)
        finally:
            await engine.stop()

    asyncio.run(story())

"""What a worker does with its engine, whoever computes in it."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest

from fastqwen.cluster import worker as worker_module
from fastqwen.cluster.port import EnginePort
from fastqwen.cluster.worker import Worker
from tests.client.fake_engine import FakeEngine
from tests.engine.fakes import READY, make_engine


class Hanging(FakeEngine):
    """It says nothing until it has slept."""

    silent_for_s = 61.0
    failure = ""

    def __init__(self) -> None:
        core, _ = make_engine()
        super().__init__(core, READY)
        self.told: list[str] = []

    def start(self) -> None: ...

    async def sleep(self, level: int = 2) -> None:
        self.told.append("sleep")
        self.silent_for_s = 0.0

    async def wake_up(self) -> None:
        self.told.append("wake up")

    async def stop(self) -> None:
        self.told.append("stop")


@pytest.mark.parametrize(
    ("device", "is_hung"), [("NVIDIA H100", True), ("2 x NVIDIA H100", True), ("CPU", False), ("2 x CPU", False)]
)
def test_an_engine_that_hangs_is_started_again(device: str, is_hung: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(worker_module, "FAREWELL_S", 0.0)
    monkeypatch.setattr(worker_module, "ON_THE_WAY_S", 0.0)
    plan = msgspec.structs.replace(READY.plan, device=device)

    async def story() -> list[str]:
        engine: Any = Hanging()
        engine.ready = msgspec.structs.replace(READY, plan=plan)
        port = EnginePort(engine, "a-token-of-these-tests-only")
        worker = Worker(engine, port, "h:1", ["Qwen"], 1.0)
        running = asyncio.create_task(worker.run())
        try:
            await asyncio.sleep(0.3)
            worker.drain()
            await asyncio.wait_for(running, 10)
        finally:
            await port.close()
        return list(engine.told)

    assert asyncio.run(story()) == (["sleep", "wake up", "stop"] if is_hung else ["stop"])

"""Who watches over the engine: whatever goes wrong there is told, and nobody waits for ever."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import pytest

from fastqwen.config import EngineConfig
from fastqwen.errors import FastqwenError
from fastqwen.ipc import process_engine
from fastqwen.ipc.process_engine import ProcessEngine

FAKE = (sys.executable, "-m", "tests.client.fake_process")


def watched(**options: Any) -> ProcessEngine:
    return ProcessEngine(EngineConfig(model="fake"), Path("nowhere"), **{"command": FAKE, **options})


def why_not_ready(engine: ProcessEngine) -> str:
    async def run() -> str:
        engine.start()
        try:
            async with asyncio.timeout(60):
                with pytest.raises(FastqwenError) as found:
                    await engine.wait_ready()
            return str(found.value)
        finally:
            await engine.stop()

    return asyncio.run(run())


def test_a_command_that_cannot_be_started_is_told():
    assert "cannot be run" in why_not_ready(watched(command=("/nowhere/to/be/found",)))


def test_a_failure_in_what_is_told_of_a_start_ends_it():
    def broken(ready: object) -> None:
        raise OSError("no space left on device")

    assert "no space left on device" in why_not_ready(watched(on_ready=broken))


def test_a_full_disk_under_the_socket_is_told(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tempfile.tempdir", "/proc/nowhere")
    assert "cannot be run" in why_not_ready(watched())


def test_what_is_no_message_of_an_engine_ends_it():
    words = (
        "import sys, zmq; s = zmq.Context().socket(zmq.PAIR); s.connect(sys.argv[1]); s.send(b'?'); s.recv(); s.recv()"
    )
    assert "cannot be run" in why_not_ready(watched(command=(sys.executable, "-c", words)))


def test_an_engine_that_dies_while_it_restarts_is_tried_again_but_not_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Ready once, then dead at each start."""
    monkeypatch.setattr(process_engine, "RESTART_PAUSE_S", 0.01)
    mark = tmp_path / "was-here"
    words = (
        "import os, sys, pathlib; mark = pathlib.Path(sys.argv[1]); mark.exists() and os._exit(9); mark.touch();"
        "from tests.client.fake_process import start; from fastqwen.ipc.engine_main import main;"
        "main(sys.argv[2], sys.argv[3], start)"
    )
    engine = watched(command=(sys.executable, "-c", words, str(mark)))

    async def run() -> None:
        engine.start()
        try:
            async with asyncio.timeout(60):
                await engine.wait_ready()
                assert engine._process is not None and engine._process._process is not None
                engine._process._process.kill()
                while engine.state != "failed":
                    await asyncio.sleep(0.01)
            assert "3 times while it was started again" in engine.failure
        finally:
            await engine.stop()

    asyncio.run(run())

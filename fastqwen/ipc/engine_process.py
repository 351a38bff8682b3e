"""One process of the engine, from its start to its end."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from collections.abc import Callable, Sequence

from fastqwen.ipc import wire
from fastqwen.ipc.engine_socket import EngineSocket

# -P: a user's own random.py in the working folder must not become the engine's.
ENGINE_COMMAND = (sys.executable, "-P", "-m", "fastqwen.ipc.engine_main")
KILL_AFTER_S = 5.0
LAST_WORDS_S = 0.2


class EngineProcess:
    def __init__(self, command: Sequence[str], log_format: str) -> None:
        self._command, self._log_format = command, log_format
        self._socket = EngineSocket()
        self._process: asyncio.subprocess.Process | None = None
        self.send = self._socket.send

    async def run(self, start: wire.Start, take: Callable[[wire.FromEngine], None]) -> None:
        """``take`` gets what the engine says. Returns when the process has ended and said its last words."""
        try:
            self._process = await asyncio.create_subprocess_exec(
                *self._command, self._socket.address, self._log_format, stdin=asyncio.subprocess.DEVNULL
            )
            listening = asyncio.create_task(self._listen(start, take))
            try:
                await self._process.wait()
                await asyncio.wait([listening], timeout=LAST_WORDS_S)
            finally:
                listening.cancel()
        finally:
            self._socket.close()

    async def _listen(self, start: wire.Start, take: Callable[[wire.FromEngine], None]) -> None:
        await self._socket.begin(start)
        message: wire.FromEngine | None = None
        while not isinstance(message, wire.Failed):
            message = await self._socket.receive()
            take(message)

    def how_it_ended(self) -> str:
        assert self._process is not None
        status = self._process.returncode
        hint = " (killed, often for want of memory)" if status == -signal.SIGKILL else ""
        return f"the engine process ended with status {status}{hint}"

    async def end(self) -> None:
        """Asked first, killed if it does not obey."""
        process = self._process
        if process is None or process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            await asyncio.wait_for(process.wait(), KILL_AFTER_S)
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

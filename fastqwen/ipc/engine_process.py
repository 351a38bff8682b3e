"""One process of the engine, from its start to its end, and this side's end of the socket between the two."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence

import zmq
import zmq.asyncio

from fastqwen.ipc import wire
from fastqwen.lifeline import PARENT_VARIABLE

# -P: a user's own random.py in the working folder must not become the engine's.
ENGINE_COMMAND = (sys.executable, "-P", "-m", "fastqwen.ipc.engine_main")
KILL_AFTER_S = 5.0
LAST_WORDS_S = 0.2


class EngineProcess:
    def __init__(self, command: Sequence[str], log_format: str) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="fastqwen-")  # made with mode 0700
        address = f"ipc://{self._directory.name}/engine"
        self._command = (*command, address, log_format)
        self._context = zmq.asyncio.Context()
        self._socket: zmq.asyncio.Socket = self._context.socket(zmq.PAIR)
        self._socket.set_hwm(0)
        self._socket.bind(address)
        self._process: asyncio.subprocess.Process | None = None

    def send(self, message: wire.ToEngine) -> None:
        """Does not wait, so that it can be called while a task is being cancelled."""
        with contextlib.suppress(zmq.ZMQError):
            self._socket.send(wire.encode(message))

    async def run(self, start: wire.Start, take: Callable[[wire.FromEngine], None]) -> None:
        """``take`` gets what the engine says. Returns when the process has ended and said its last words. Raises what
        ``take`` raises, and OSError where there can be no process; then the process is gone as well."""
        environment = {**os.environ, PARENT_VARIABLE: str(os.getpid())}
        try:
            self._process = await asyncio.create_subprocess_exec(
                *self._command, stdin=asyncio.subprocess.DEVNULL, env=environment
            )
            ending = asyncio.create_task(self._process.wait())
            listening = asyncio.create_task(self._listen(start, take))
            try:
                await asyncio.wait({ending, listening}, return_when=asyncio.FIRST_COMPLETED)
                if listening.done():
                    listening.result()
                await ending
                await asyncio.wait([listening], timeout=LAST_WORDS_S)
                if listening.done():
                    listening.result()
            except BaseException:
                await self.end()
                raise
            finally:
                ending.cancel()
                listening.cancel()
        finally:
            self._context.destroy(linger=0)
            self._directory.cleanup()

    async def _listen(self, start: wire.Start, take: Callable[[wire.FromEngine], None]) -> None:
        await self._socket.send(wire.encode(start))  # waits until the engine has connected
        message: wire.FromEngine | None = None
        while not isinstance(message, wire.Failed):
            message = wire.from_engine.decode(await self._socket.recv())
            take(message)
            await asyncio.sleep(0)  # one that is there already is received without a turn for others

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

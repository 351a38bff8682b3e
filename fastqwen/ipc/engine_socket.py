"""The API process's end of the socket: in a private directory, one for each process that is started."""

from __future__ import annotations

import contextlib
import tempfile

import zmq
import zmq.asyncio

from fastqwen.ipc import wire


class EngineSocket:
    def __init__(self) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="fastqwen-")  # made with mode 0700
        self.address = f"ipc://{self._directory.name}/engine"
        self._context = zmq.asyncio.Context()
        self._socket: zmq.asyncio.Socket = self._context.socket(zmq.PAIR)
        self._socket.set_hwm(0)
        self._socket.bind(self.address)

    async def begin(self, start: wire.Start) -> None:
        """Returns once the engine has connected."""
        await self._socket.send(wire.encode(start))

    def send(self, message: wire.ToEngine) -> None:
        """Does not wait, so that it can be called while a task is being cancelled."""
        with contextlib.suppress(zmq.ZMQError):
            self._socket.send(wire.encode(message))

    async def receive(self) -> wire.FromEngine:
        message: wire.FromEngine = wire.from_engine.decode(await self._socket.recv())
        return message

    def close(self) -> None:
        self._context.destroy(linger=0)
        self._directory.cleanup()

"""``fastqwen ranks``: this machine computes its share of a model for a worker on another one.

It knows no model until a worker with the cluster's token names one, and forgets it when that worker's engine ends or is
silent. What it starts ends with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import msgspec
import zmq
import zmq.asyncio

from fastqwen.cluster.controller import until_signal
from fastqwen.cluster.engine_over_hosts import RANK_COMMAND
from fastqwen.cluster.places import checkpoint_digest
from fastqwen.cluster.rank_wire import (
    ALIVE_EVERY_S,
    SILENT_S,
    Alive,
    Busy,
    Carry,
    Ended,
    FromHost,
    Lend,
    Pulse,
    ToHost,
    to_host,
)
from fastqwen.cluster.secret import VARIABLE, read_token
from fastqwen.cluster.sockets import Listening
from fastqwen.errors import FastqwenError
from fastqwen.hub import find_checkpoint
from fastqwen.lifeline import PARENT_VARIABLE, end_with_starter
from fastqwen.logs import configure_logging
from fastqwen.ranks import wire as ranks_wire
from fastqwen.server.http.listen import run_loop
from fastqwen.version import __version__

log = logging.getLogger("fastqwen.cluster")


class RanksConfig(msgspec.Struct, frozen=True, kw_only=True):
    """``count`` ranks are computed here at most; None: one for each GPU, or one where there is none. ``model`` is where the
    checkpoint lies here, if not under the name that the worker has for it."""

    host: str
    port: int
    count: int | None = None
    model: str | None = None
    token_file: Path | None = None
    log_format: str = "text"


class RankHost:
    def __init__(self, token: str, count: int, model: str | None = None) -> None:
        self._token, self._count, self._model = token, count, model
        self._lent: dict[bytes, _Lent] = {}
        self._listening: Listening[ToHost] = Listening(token, to_host.decode, self._take)
        self._task: asyncio.Task[None] | None = None

    def bind(self, host: str, port: int) -> int:
        return self._listening.bind(host, port, "--port to choose another")

    def start(self) -> None:
        self._listening.start()
        self._task = asyncio.create_task(self._keep_looking(), name="lent-ranks")

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
        for who in list(self._lent):
            self._end(who, Ended("the host was told to end"))
        await self._listening.close()

    def say(self, who: bytes, message: FromHost) -> None:
        self._listening.send(who, message)

    def _take(self, who: bytes, message: ToHost) -> None:
        lent = self._lent.get(who)
        if isinstance(message, Lend):
            self._lend(who, message)
        elif lent is None:
            self.say(who, Ended("it knows of no such rank: the connection broke in between"))
        else:
            lent.heard_s = time.monotonic()
            if isinstance(message, Carry):
                lent.tell(message.data)

    def _lend(self, who: bytes, lend: Lend) -> None:
        if lend.version != __version__:
            self.say(who, Ended(f"fastqwen {__version__} is there and {lend.version} here: install one version", True))
        elif len(self._lent) >= self._count:
            self.say(who, Busy())
        else:
            log.info("rank %d of %d of %s", lend.begin.index, lend.begin.count, lend.begin.config.model)
            self._lent[who] = _Lent(self, who, lend, self._token, self._model)

    async def _keep_looking(self) -> None:
        while True:
            await asyncio.sleep(ALIVE_EVERY_S)
            for who, lent in list(self._lent.items()):
                why = lent.how_it_ended()
                if why is None and time.monotonic() - lent.heard_s > SILENT_S:
                    why = Ended("its engine fell silent")
                if why is not None:
                    self._end(who, why)
                else:
                    self.say(who, Alive())

    def _end(self, who: bytes, why: Ended) -> None:
        lent = self._lent.pop(who)
        log.info("rank %d of %s has ended: %s", lent.begin.index, lent.begin.config.model, why.why)
        lent.close()
        self.say(who, why)


class _Lent:
    """One rank's process here, for an engine elsewhere."""

    def __init__(self, host: RankHost, who: bytes, lend: Lend, token: str, model: str | None) -> None:
        self.begin, self.heard_s = lend.begin, time.monotonic()
        self._host, self._who, self._lend, self._token, self._model = host, who, lend, token, model
        self._directory = tempfile.TemporaryDirectory(prefix="fastqwen-rank-")  # made with mode 0700
        self._context = zmq.asyncio.Context()
        self._socket: zmq.asyncio.Socket = self._context.socket(zmq.PAIR)
        self._socket.set_hwm(0)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.bind(self._address)
        self._process: subprocess.Popen[bytes] | None = None
        self._pulse: int | None = None
        self._why: Ended | None = None
        self._task = asyncio.create_task(self._run(), name="lent-rank")

    @property
    def _address(self) -> str:
        return f"ipc://{self._directory.name}/rank"

    def tell(self, data: bytes) -> None:
        """What the engine says. Its Begin is said here, with this host's path, as the first word."""
        if not isinstance(ranks_wire.to_rank.decode(data), ranks_wire.Begin):
            self._socket.send(data)

    def how_it_ended(self) -> Ended | None:
        return self._why

    def close(self) -> None:
        self._task.cancel()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        if self._pulse is not None:
            asyncio.get_running_loop().remove_reader(self._pulse)
            os.close(self._pulse)
        self._context.destroy(linger=0)
        self._directory.cleanup()

    async def _run(self) -> None:
        self._host.say(self._who, Alive())  # it has been heard
        try:
            path = await self._found()
            self._start(path)
            while True:
                self._host.say(self._who, Carry(await self._socket.recv()))
        except FastqwenError as error:
            self._why = Ended(str(error), is_mistake=True)
        except OSError as error:
            self._why = Ended(f"its process cannot be started: {error}")

    async def _found(self) -> Path:
        """The checkpoint. Raises FastqwenError where there is none, or another one than the worker's."""
        config = self.begin.config
        if self._model is not None:
            config = msgspec.structs.replace(config, model=self._model)
        finding = asyncio.create_task(asyncio.to_thread(find_checkpoint, config))
        while not finding.done():  # it may be fetched first, which no process of a rank gives a sign of life for
            await asyncio.wait([finding], timeout=ALIVE_EVERY_S)
            self._host.say(self._who, Pulse())
        path, _ = finding.result()
        if config.load_format != "dummy" and checkpoint_digest(path) != self._lend.checkpoint:
            raise FastqwenError(f"{path} there is another checkpoint than {self.begin.path} here")
        return path

    def _start(self, path: Path) -> None:
        reader, writer = os.pipe()
        places = self._lend.places
        words = (*RANK_COMMAND, msgspec.json.encode(places).decode(), str(places.host_of(self.begin)), self._address)
        environment = {**os.environ, VARIABLE: self._token, PARENT_VARIABLE: str(os.getpid())}
        try:
            self._process = subprocess.Popen(
                (*words, "ipc://none", str(writer)), stdin=subprocess.DEVNULL, env=environment, pass_fds=(writer,)
            )
        finally:
            os.close(writer)
        self._pulse = reader
        os.set_blocking(reader, False)
        asyncio.get_running_loop().add_reader(reader, self._on_pulse, reader)
        self._socket.send(ranks_wire.encode(msgspec.structs.replace(self.begin, path=str(path))))

    def _on_pulse(self, reader: int) -> None:
        with contextlib.suppress(BlockingIOError):
            if os.read(reader, 2**16):
                self._host.say(self._who, Pulse())
                return
            asyncio.get_running_loop().remove_reader(reader)
            self._why = self._why or Ended("its process ended")


def lend_ranks(config: RanksConfig) -> int:
    """Runs until a signal. Returns the exit status. Raises FastqwenError for what the user must change."""
    end_with_starter()
    configure_logging(config.log_format)
    return run_loop(_lend_ranks(config, read_token(config.token_file)))


async def _lend_ranks(config: RanksConfig, token: str) -> int:
    count = config.count
    if count is None:
        count = await asyncio.to_thread(num_devices)
    host = RankHost(token, count, config.model)
    port = host.bind(config.host, config.port)
    host.start()
    log.info("up to %d ranks are computed here for workers that call port %d of %s", count, port, config.host)
    await until_signal()
    await host.close()
    return 0


def num_devices(least: int = 1) -> int:
    """GPUs, at least so many. In a process of its own: a CUDA context here would take memory from the ranks."""
    code = "import torch; print(torch.cuda.device_count())"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False)
    return max(least, int(done.stdout)) if done.stdout.strip().isdigit() else least

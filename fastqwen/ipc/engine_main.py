"""The engine process: ``python -m fastqwen.ipc.engine_main ADDRESS LOG_FORMAT``. It ends when its parent does."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import zmq

if TYPE_CHECKING:
    from llguidance import LLTokenizer

    from fastqwen.runner.held import HeldWeights
    from fastqwen.runner.start import Engine

from fastqwen.client.engine import Ready
from fastqwen.collections_paused import collections_paused
from fastqwen.engine.core import EngineCore, EngineStats
from fastqwen.errors import FastqwenError
from fastqwen.ipc import wire
from fastqwen.ipc.arrivals import Arrivals
from fastqwen.lifeline import watch_parent
from fastqwen.logs import configure_logging
from fastqwen.model_config import ModelConfig
from fastqwen.ranks.group import RANK_COMMAND, RankLost

log = logging.getLogger("fastqwen.engine")

Starter = Callable[..., "Engine"]  # as start_real_engine; weights only where an engine before had some

SWITCH_S = (
    0.0005  # a step calls into native code a hundred times, and may wait so long for Python's lock after each call
)
IDLE_WAIT_MS = 500  # also how often an idle engine shows that it lives


def main(address: str, log_format: str = "text", start_engine: Starter | None = None) -> int:
    """``start_engine`` is the real one unless a test brings another."""
    # In a thread, since loading may take minutes and a step may hang; the kernel's signal would leave the directory behind.
    watch_parent(lambda: _tidy(Path(address.removeprefix("ipc://"))))
    configure_logging(log_format, "engine")
    sys.setswitchinterval(SWITCH_S)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the parent decides
    context = zmq.Context()
    socket = context.socket(zmq.PAIR)
    socket.setsockopt(zmq.LINGER, 1000)
    socket.set_hwm(0)
    socket.connect(address)
    try:
        start = wire.to_engine.decode(socket.recv())
        assert isinstance(start, wire.Start)
        weights: HeldWeights | None = None
        while True:
            engine = _start(socket, start, start_engine or partial(start_real_engine, log_format=log_format), weights)
            if engine is None:
                return 1
            weights = engine.weights
            if not _serve(socket, engine.core, Arrivals(engine.compiler), engine.check):
                return 0
            del engine
            _put_away(weights)
            _sleep(socket)
    except RankLost as error:
        log.error("%s", error)
        os._exit(1)  # the server tells its requests once this process is gone, and Python takes its time to leave
    finally:
        socket.close()
        context.term()
    return 0


def _tidy(path: Path) -> None:
    """A server that was killed leaves its socket and the directory made for it."""
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)
        path.parent.rmdir()


def start_real_engine(
    start: wire.Start,
    progress: Callable[[int, int], None],
    *,
    log_format: str = "text",
    rank_command: Sequence[str] = RANK_COMMAND,
    weights: HeldWeights | None = None,
) -> Engine:
    """``rank_command`` starts a rank, where there are several (ranks/group.py). ``weights`` are an earlier engine's."""
    with collections_paused():
        from fastqwen.ranks.start import start_engine
    from fastqwen.text.load import load_text

    path = Path(start.path)

    def grammar_tokenizer(model: ModelConfig) -> LLTokenizer:
        return load_text(path, model, start.config).grammar_tokenizer(model)

    return start_engine(
        start.config,
        path,
        progress,
        grammar_tokenizer=grammar_tokenizer,
        log_format=log_format,
        command=rank_command,
        weights=weights,
    )


def _start(
    socket: zmq.Socket[bytes], start: wire.Start, starter: Starter, weights: HeldWeights | None
) -> Engine | None:
    def progress(done: int, total: int) -> None:
        socket.send(wire.encode(wire.Loading(done, total)))

    try:
        engine = starter(start, progress) if weights is None else starter(start, progress, weights=weights)
    except RankLost:
        raise
    except FastqwenError as error:
        socket.send(wire.encode(wire.Failed(str(error))))
        return None
    socket.send(wire.encode(Ready(engine.plan, engine.model, engine.comparison)))
    return engine


def _serve(socket: zmq.Socket[bytes], core: EngineCore, arrivals: Arrivals, check: Callable[[], None]) -> bool:
    """True once it is to sleep; False if it cannot go on."""
    told_s = 0.0
    sleepy = False
    while True:
        wait_ms = 0 if sleepy or core.has_work else arrivals.patience_ms(IDLE_WAIT_MS)
        sleepy = _take_messages(socket, core, arrivals, wait_ms) or sleepy
        if sleepy and not core.has_work:
            return True
        for request in arrivals.ready():
            core.add(request)
        check()
        try:
            deltas = arrivals.refused() + core.step()
        except RankLost:
            raise
        except FastqwenError as error:  # the weights were changed: no answer can be right any more
            socket.send(wire.encode(wire.Failed(str(error))))
            return False
        now_s = time.monotonic()
        if deltas or now_s - told_s > IDLE_WAIT_MS / 1000:
            socket.send(wire.encode(wire.Deltas(deltas, core.stats())))
            told_s = now_s


def _put_away(weights: HeldWeights | None) -> None:
    if weights is None:  # there is no device in this process
        gc.collect()
        return
    from fastqwen.runner.held import give_back

    weights.put_away()
    give_back()


def _sleep(socket: zmq.Socket[bytes]) -> None:
    """Until it is to wake up; the server hears every now and then that the process lives."""
    socket.send(wire.encode(wire.Asleep()))
    while True:
        if not socket.poll(IDLE_WAIT_MS):
            socket.send(wire.encode(wire.Deltas([], EngineStats())))
        elif isinstance(wire.to_engine.decode(socket.recv()), wire.Wake):
            return


def _take_messages(socket: zmq.Socket[bytes], core: EngineCore, arrivals: Arrivals, wait_ms: int) -> bool:
    """Whether one of them said that it is to sleep."""
    sleepy = False
    while socket.poll(wait_ms):
        wait_ms = 0
        message = wire.to_engine.decode(socket.recv())
        if isinstance(message, wire.Add):
            for request in message.requests:
                arrivals.put(request)
        elif isinstance(message, wire.Abort):
            for request_id in message.request_ids:
                arrivals.drop(request_id)
                core.abort(request_id)
        elif isinstance(message, wire.Sleep):
            sleepy = True
    return sleepy


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2]))

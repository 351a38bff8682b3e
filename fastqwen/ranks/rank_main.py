"""A rank's process: ``python -m fastqwen.ranks.rank_main ADDRESS GRAMMARS PIPE``. It ends with the one that started it."""

from __future__ import annotations

import logging
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import zmq

from fastqwen.config import EngineConfig
from fastqwen.engine.executor import Executor, StepHandle
from fastqwen.errors import BadConfig, FastqwenError
from fastqwen.lifeline import end_with_parent
from fastqwen.ranks import wire
from fastqwen.ranks.call import called
from fastqwen.ranks.pulse import beat
from fastqwen.ranks.world import join
from fastqwen.runner.device import choose_device
from fastqwen.runner.start import Computer, start_computer

if TYPE_CHECKING:
    from llguidance import LLTokenizer

    from fastqwen.model_config import ModelConfig
    from fastqwen.runner.start import Compiler, GrammarTokenizer
    from fastqwen.sharding import World

log = logging.getLogger("fastqwen.engine")

# A GPU computes a step in about a second at most, and all that it needs is compiled before the first one, unless nothing is
# recorded. On a CPU a step may take any time.
PATIENCE_S, PATIENCE_WITHOUT_GRAPHS_S = 15.0, 120.0


@dataclass(frozen=True)
class Seat:
    """A rank among those of its own host, and how it meets all of them: ``join(index, count, device, meeting)``."""

    index: int
    count: int
    join: Callable[[int, int, torch.device, Path], World]


def main(address: str, grammars: str, pipe: str) -> int:
    end_with_parent()
    beat(int(pipe))
    context, socket, begin = called(address)
    return compute(context, socket, grammars, begin, Seat(begin.index, begin.count, join))


def compute(
    context: zmq.Context[zmq.Socket[bytes]], socket: zmq.Socket[bytes], grammars: str, begin: wire.Begin, seat: Seat
) -> int:
    """Until this process is ended."""
    try:
        computer = _start(socket, begin, seat)
    except FastqwenError as error:
        socket.send(wire.encode(wire.Failed(str(error))))
        signal.pause()  # the others wait for this one: whoever started all of them ends them
        return 1
    if begin.index:
        _follow(socket, computer.executor)
    if computer.compiler is not None:
        _serve_grammars(context, grammars, computer.compiler)
    _lead(socket, computer.executor)
    return 0


def _start(socket: zmq.Socket[bytes], begin: wire.Begin, seat: Seat) -> Computer:
    def told(recording: bool, done: int, total: int) -> None:
        socket.send(wire.encode(wire.Loading(done, total, recording)))

    config = begin.config
    device = shard_device(config, seat.index, seat.count)
    if device.type == "cpu":
        torch.set_num_threads(max(1, (config.num_threads or torch.get_num_threads()) // seat.count))
    world = seat.join(begin.index, begin.count, device, Path(begin.meeting))
    socket.send(wire.encode(wire.Joined()))
    computer = start_computer(
        config,
        Path(begin.path),
        device,
        world,
        lambda done, total: told(False, done, total),
        lambda done, total: told(True, done, total),
        None if begin.index or config.skip_tokenizer_init else _tokenizer_of(config, Path(begin.path)),
    )
    facts = computer.plan, computer.model, computer.comparison, computer.tile_tokens, computer.executor.run_ahead
    patience_s = None
    if device.type == "cuda":
        patience_s = PATIENCE_WITHOUT_GRAPHS_S if config.enforce_eager else PATIENCE_S
    socket.send(wire.encode(wire.Started(*facts, str(device), patience_s)))
    return computer


def shard_device(config: EngineConfig, index: int, count: int) -> torch.device:
    """Raises BadConfig where there are GPUs, but not enough of them."""
    if config.device != "cpu" and index < torch.cuda.device_count():
        torch.cuda.set_device(index)  # first of all: else each rank would hold a context on the first GPU
    device = choose_device(config)
    if device.type == "cuda" and torch.cuda.device_count() < count:
        raise BadConfig(f"--tensor-parallel-size is {count}, but torch sees {torch.cuda.device_count()} GPUs here")
    return device


def _tokenizer_of(config: EngineConfig, path: Path) -> GrammarTokenizer:
    def grammar_tokenizer(model: ModelConfig) -> LLTokenizer:
        from fastqwen.text.load import load_text

        return load_text(path, model, config).grammar_tokenizer(model)

    return grammar_tokenizer


def _lead(socket: zmq.Socket[bytes], executor: Executor) -> None:
    """The first rank: submit what comes, and give each result when it is asked for."""
    submitted: deque[StepHandle] = deque()
    while True:
        message = wire.to_rank.decode(socket.recv())
        try:
            if isinstance(message, wire.Step):
                submitted.append(executor.submit(message.batch))
                if message.tells_late:
                    socket.send(wire.encode(wire.Submitted(list(submitted[-1].late))))
            elif isinstance(message, wire.Read):
                socket.send(wire.encode(wire.Result(submitted.popleft().result())))
        except FastqwenError as error:  # the weights were changed
            socket.send(wire.encode(wire.Failed(str(error))))


def _follow(socket: zmq.Socket[bytes], executor: Executor) -> None:
    while True:
        message = wire.to_rank.decode(socket.recv())
        assert isinstance(message, wire.Step)
        executor.submit(message.batch)


def _serve_grammars(context: zmq.Context[zmq.Socket[bytes]], address: str, compiler: Compiler) -> None:
    socket = context.socket(zmq.REP)
    socket.connect(address)

    def serve() -> None:
        while True:
            compiler.compile(socket.recv().decode())
            socket.send(b"")

    threading.Thread(target=serve, name="grammars", daemon=True).start()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

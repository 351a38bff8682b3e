"""The ranks' processes: started together, watched, and ended together."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import zmq

from fastqwen.config import EngineConfig
from fastqwen.errors import FastqwenError
from fastqwen.lifeline import PARENT_VARIABLE
from fastqwen.ranks import wire
from fastqwen.ranks.pulse import BEAT_S, Pulses

RANK_COMMAND = (sys.executable, "-P", "-m", "fastqwen.lifeline", "fastqwen.ranks.rank_main")
SILENT_WHILE_LOADING_S, SILENT_S = 120.0, 10.0
Progress = Callable[[int, int], None]


class RankLost(FastqwenError):
    """A rank ended or hangs, and with it all of them. Nothing that the user asked for is the reason."""


class Group:
    """One process for each rank; they end with this process, with ``close``, or with each other."""

    def __init__(self, config: EngineConfig, path: Path, *, log_format: str, command: Sequence[str]) -> None:
        self.count = config.tensor_parallel_size
        self.lost: str | None = None
        self._processes: list[subprocess.Popen[bytes]] = []
        self._silent_limit_s = SILENT_WHILE_LOADING_S
        self._lock = threading.Lock()
        self._context = zmq.Context()
        self._sockets: list[zmq.Socket[bytes]] = []
        self._closed = threading.Event()
        self._directory = tempfile.TemporaryDirectory(prefix="fastqwen-ranks-")  # made with mode 0700
        pipes = [os.pipe() for _ in range(self.count)]
        self._pulses = Pulses([reader for reader, _ in pipes])
        for index in range(self.count):
            socket = self._context.socket(zmq.PAIR)
            socket.set_hwm(0)
            socket.setsockopt(zmq.LINGER, 0)
            socket.bind(self._address(index))
            self._sockets.append(socket)
        self._asking = self._context.socket(zmq.REQ)
        self._asking.setsockopt(zmq.LINGER, 0)
        self._asking.bind(self._address("grammars"))
        self._spawn(command, [writer for _, writer in pipes])
        meeting = f"{self._directory.name}/meeting"
        for index in range(self.count):
            self.send(index, wire.Begin(config, str(path), index, self.count, meeting, log_format))

    def _address(self, name: int | str) -> str:
        return f"ipc://{self._directory.name}/{name}"

    def _spawn(self, command: Sequence[str], pipes: list[int]) -> None:
        """From a thread that lives as long as they may: the kernel kills them when the thread that started them ends."""
        started = threading.Event()

        def start() -> None:
            environment = {**os.environ, PARENT_VARIABLE: str(os.getpid())}
            try:
                for index, pipe in enumerate(pipes):
                    words = (*command, self._address(index), self._address("grammars"), str(pipe))
                    self._processes.append(
                        subprocess.Popen(words, stdin=subprocess.DEVNULL, env=environment, pass_fds=(pipe,))
                    )
            finally:
                for pipe in pipes:
                    os.close(pipe)
                started.set()
            self._closed.wait()

        threading.Thread(target=start, name="ranks", daemon=True).start()
        started.wait()

    def send(self, index: int, message: wire.ToRank) -> None:
        self._sockets[index].send(wire.encode(message))

    def send_step(self, step: wire.Step, for_others: wire.Step) -> None:
        self.send(0, step)
        encoded = wire.encode(for_others)
        for socket in self._sockets[1:]:
            socket.send(encoded)

    def start(self, on_loading: Progress, on_recording: Progress) -> list[wire.Started]:
        """Wait until all can compute. Progress is told of all ranks together. Raises FastqwenError."""
        done: dict[tuple[bool, int], tuple[int, int]] = {}
        started: dict[int, wire.Started] = {}
        num_joined = 0
        while len(started) < self.count:
            for index in self._wait_for(self._sockets):
                message = wire.from_rank.decode(self._sockets[index].recv())
                if isinstance(message, wire.Failed):
                    self.close()
                    raise FastqwenError(message.message)
                if isinstance(message, wire.Joined):
                    num_joined += 1
                    if num_joined == self.count:
                        self._directory.cleanup()  # all that must be found in it was found
                elif isinstance(message, wire.Loading):
                    done[message.recording, index] = (message.done, message.total)
                    told = [figures for (recording, _), figures in done.items() if recording == message.recording]
                    total = message.total * self.count
                    (on_recording if message.recording else on_loading)(sum(one for one, _ in told), total)
                elif isinstance(message, wire.Started):
                    started[index] = message
        self._silent_limit_s = SILENT_S
        return [started[index] for index in range(self.count)]

    def receive(self, patience_s: float | None) -> wire.FromRank:
        """The first rank's next message. Raises RankLost, also where it takes longer than ``patience_s``."""
        waited_s = 0.0
        while not self._wait_for(self._sockets[:1]):
            waited_s += BEAT_S
            if patience_s is not None and waited_s > patience_s:
                raise self._lose(f"a step took longer than {patience_s:.0f} s")
        message: wire.FromRank = wire.from_rank.decode(self._sockets[0].recv())
        return message

    def prepare(self, grammar: str) -> None:
        """Let the first rank compile a grammar. From one thread, which need not be the one that computes."""
        self._asking.send(grammar.encode())
        while self.lost is None and not self._asking.poll(int(BEAT_S * 1000)):
            pass
        if self.lost is None:
            self._asking.recv()

    def _wait_for(self, sockets: list[zmq.Socket[bytes]]) -> list[int]:
        """Which of them have a message; none after a while."""
        poller = zmq.Poller()
        for socket in sockets:
            poller.register(socket, zmq.POLLIN)
        for pipe in self._pulses.pipes:
            poller.register(pipe, zmq.POLLIN)
        end_s = time.monotonic() + BEAT_S
        while True:
            found = dict(poller.poll(max(0, int((end_s - time.monotonic()) * 1000))))
            ready = [index for index, socket in enumerate(sockets) if socket in found]
            if ready:
                return ready
            self.check()
            if time.monotonic() >= end_s:
                return []

    def check(self) -> None:
        """Raises RankLost if a rank has ended, or is silent for long."""
        if self.lost is not None:
            raise RankLost(self.lost)
        ended = self._pulses.look()
        if ended is not None:
            raise self._lose(self._how_it_ended(ended))
        silent_s = max(self._pulses.silent_s)
        if silent_s > self._silent_limit_s:
            index = self._pulses.silent_s.index(silent_s)
            raise self._lose(f"rank {index} of {self.count} has been silent for {silent_s:.0f} s")

    def _how_it_ended(self, index: int) -> str:
        try:
            status: int | None = self._processes[index].wait(1.0)
        except subprocess.TimeoutExpired:
            status = None
        return f"rank {index} of {self.count} ended" + (f" with status {status}" if status is not None else "")

    def _lose(self, why: str) -> RankLost:
        self.lost = why
        self.close()
        return RankLost(why)

    def close(self) -> None:
        """They keep nothing that must be saved. Closing twice does nothing."""
        with self._lock:
            if self._closed.is_set():
                return
            self._closed.set()
        self.lost = self.lost or "the ranks were ended"
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()
        self._pulses.close()
        for socket in self._sockets:
            socket.close()
        self._directory.cleanup()

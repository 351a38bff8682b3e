"""The first words between a rank and whoever started it. Imports no torch: a rank of another host is only stood in for here."""

from __future__ import annotations

import signal

import zmq

from fastqwen.logs import configure_logging
from fastqwen.ranks import wire


def called(address: str) -> tuple[zmq.Context[zmq.Socket[bytes]], zmq.Socket[bytes], wire.Begin]:
    """The connection to whoever started this rank, and what it says first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the scheduler's process decides
    context = zmq.Context()
    socket = context.socket(zmq.PAIR)
    socket.set_hwm(0)
    socket.setsockopt(zmq.LINGER, 1000)
    socket.connect(address)
    begin = wire.to_rank.decode(socket.recv())
    assert isinstance(begin, wire.Begin)
    configure_logging(begin.log_format, f"rank {begin.index}")
    return context, socket, begin

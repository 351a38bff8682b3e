"""A rank's process where ranks are on several hosts.

``python -m fastqwen.cluster.rank_over_hosts PLACES HOST ADDRESS GRAMMARS PIPE``

HOST is the number of the host that it runs on. A rank of that host computes. One of another is only stood in for here, on the
worker's host: what is said to it is carried over, and its pulse beats here for as long as it beats there. So the engine
sees ranks of its own host and nothing else.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import zmq

from fastqwen.cluster.config import RANKS_PORT
from fastqwen.cluster.places import Places, checkpoint_digest
from fastqwen.cluster.rank_wire import ALIVE_EVERY_S, SILENT_S, Alive, Busy, Carry, Ended, Lend, Pulse, from_host
from fastqwen.cluster.secret import read_token, secure_client
from fastqwen.cluster.sockets import endpoint, split_address
from fastqwen.cluster.wire import encode
from fastqwen.lifeline import end_with_parent
from fastqwen.ranks import wire as ranks_wire
from fastqwen.ranks.call import called
from fastqwen.ranks.pulse import beat

log = logging.getLogger("fastqwen.engine")

FOUND_WITHIN_S = 60.0
ASK_AGAIN_S = 1.0
LOOK_MS = 250


def main(places_json: str, host: str, address: str, grammars: str, pipe: str) -> int:
    end_with_parent()
    places = msgspec.json.decode(places_json, type=Places)
    context, socket, begin = called(address)
    token = read_token(None)
    if places.host_of(begin) == int(host):
        beat(int(pipe))
        from fastqwen.cluster import rank_world  # torch is for those who compute
        from fastqwen.ranks import rank_main

        meet = partial(rank_world.join, address=places.meeting, token=token)
        return rank_main.compute(context, socket, grammars, begin, rank_main.Seat(*places.seat_of(begin), meet))
    return StandIn(context, socket, begin, places, int(pipe), token).run()


class StandIn:
    def __init__(
        self, context: Any, socket: Any, begin: ranks_wire.Begin, places: Places, pipe: int, token: str
    ) -> None:
        self._near, self._pipe = socket, pipe
        self._name = places.hosts[places.host_of(begin) - 1]
        self._lend = Lend(begin, places, checkpoint_digest(Path(begin.path)))
        self._far = context.socket(zmq.DEALER)
        for option, value in ((zmq.SNDHWM, 0), (zmq.RCVHWM, 0), (zmq.LINGER, 500), (zmq.IPV6, 1)):
            self._far.setsockopt(option, value)
        secure_client(self._far, token)
        self._far.connect(endpoint(*split_address(self._name, RANKS_PORT, "--rank-hosts")))

    def run(self) -> int:
        why = self._find()
        if why is None:
            why = self._carry()
        if why.is_mistake:
            self._near.send(ranks_wire.encode(ranks_wire.Failed(why.why)))
            time.sleep(SILENT_S)  # whoever started all ranks ends them
        log.error("the rank at %s: %s", self._name, why.why)
        return 1

    def _find(self) -> Ended | None:
        """Until the host has heard of it. None where it computes."""
        end_s, asked_s, busy = time.monotonic() + FOUND_WITHIN_S, -ASK_AGAIN_S, False
        while time.monotonic() < end_s:
            self._beat()
            if (busy or asked_s < 0) and time.monotonic() - asked_s > ASK_AGAIN_S:
                self._far.send(encode(self._lend))
                asked_s, busy = time.monotonic(), False
            if not self._far.poll(LOOK_MS):
                continue
            message = from_host.decode(self._far.recv())
            if isinstance(message, Ended):
                return message
            if not isinstance(message, Busy):
                return None
            busy = True
        if busy:
            return Ended(f"all ranks that {self._name} lends are taken: fastqwen ranks --count says how many", True)
        return Ended(
            f"no `fastqwen ranks` answers at {self._name} within {FOUND_WITHIN_S:.0f} s: is it running there, and has it "
            "the same token?",
            True,
        )

    def _carry(self) -> Ended:
        poller = zmq.Poller()
        for socket in (self._near, self._far):
            poller.register(socket, zmq.POLLIN)
        heard_s, told_s = time.monotonic(), 0.0
        while True:
            found = dict(poller.poll(LOOK_MS))
            now_s = time.monotonic()
            if self._near in found:
                self._far.send(encode(Carry(self._near.recv())))
            if self._far in found:
                heard_s = now_s
                message = from_host.decode(self._far.recv())
                if isinstance(message, Carry):
                    self._near.send(message.data)
                elif isinstance(message, Pulse):
                    self._beat()
                elif isinstance(message, Ended):
                    return message
            if now_s - told_s > ALIVE_EVERY_S:
                self._far.send(encode(Alive()))
                told_s = now_s
            if now_s - heard_s > SILENT_S:
                return Ended(f"silent for {now_s - heard_s:.1f} s")

    def _beat(self) -> None:
        os.set_blocking(self._pipe, False)
        with contextlib.suppress(BlockingIOError):
            os.write(self._pipe, b".")


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

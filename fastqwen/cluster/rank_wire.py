"""What a worker's engine and `fastqwen ranks` on another host say to each other. Nothing but these types is ever decoded.

engine -> host   Lend first, then Carry and Alive
host -> engine   Carry, Alive and Pulse, or once Busy or Ended
"""

from __future__ import annotations

import msgspec

from fastqwen.cluster.places import Places
from fastqwen.ranks.wire import Begin
from fastqwen.version import __version__

ALIVE_EVERY_S = 0.5
SILENT_S = 6.0  # after so long either end gives the other up


class Lend(msgspec.Struct, frozen=True, tag=True):
    """One rank is to be computed. ``version`` is the package's: ranks of one model must be of one."""

    begin: Begin
    places: Places
    checkpoint: str  # its digest
    version: str = __version__


class Carry(msgspec.Struct, frozen=True, tag=True):
    """A message of ranks/wire.py, as it was."""

    data: bytes


class Alive(msgspec.Struct, frozen=True, tag=True):
    """Whoever says this can be reached."""


class Pulse(msgspec.Struct, frozen=True, tag=True):
    """The rank itself gave a sign of life. How long it may give none is the engine's business, as for a rank beside it."""


class Busy(msgspec.Struct, frozen=True, tag=True):
    """All ranks of this host are lent. Ask again."""


class Ended(msgspec.Struct, frozen=True, tag=True):
    """There is no such rank any more. ``is_mistake``: the user must change something, and starting again is no use."""

    why: str
    is_mistake: bool = False


ToHost = Lend | Carry | Alive
FromHost = Carry | Alive | Pulse | Busy | Ended

to_host = msgspec.msgpack.Decoder(ToHost)
from_host = msgspec.msgpack.Decoder(FromHost)

"""What the two processes say to each other. Nothing but these types is ever decoded."""

from __future__ import annotations

import msgspec

from fastqwen.client.engine import Ready
from fastqwen.config import EngineConfig
from fastqwen.engine.core import EngineStats
from fastqwen.records import EngineRequest, RequestDelta


class Start(msgspec.Struct, frozen=True, tag=True):
    config: EngineConfig
    path: str


class Add(msgspec.Struct, frozen=True, tag=True):
    requests: list[EngineRequest]


class Abort(msgspec.Struct, frozen=True, tag=True):
    request_ids: list[str]


class Sleep(msgspec.Struct, frozen=True, tag=True):
    """Give back what the device holds; the weights wait in host memory. Only to an engine that has nothing to do."""


class Wake(msgspec.Struct, frozen=True, tag=True):
    """Answered as a start is."""


class Asleep(msgspec.Struct, frozen=True, tag=True):
    """The memory is given back."""


class Loading(msgspec.Struct, frozen=True, tag=True):
    done: int
    total: int


class Deltas(msgspec.Struct, frozen=True, tag=True):
    """Everything that one step gave, and how the engine is. Sent without deltas as a sign of life."""

    deltas: list[RequestDelta]
    stats: EngineStats


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The engine cannot start because of what the user asked for; the text is for the user."""

    message: str


ToEngine = Start | Add | Abort | Sleep | Wake
FromEngine = Loading | Ready | Deltas | Asleep | Failed

to_engine = msgspec.msgpack.Decoder(ToEngine)
from_engine = msgspec.msgpack.Decoder(FromEngine)
encode = msgspec.msgpack.Encoder().encode

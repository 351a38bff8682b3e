"""What the scheduler's process and its ranks say to each other. Nothing but these types is ever decoded."""

from __future__ import annotations

import msgspec

from fastqwen.config import EngineConfig
from fastqwen.model_config import ModelConfig
from fastqwen.plan import EnginePlan, Line
from fastqwen.records import ScheduledBatch, StepOutput


class Begin(msgspec.Struct, frozen=True, tag=True):
    """``meeting`` is a file by which the ranks find each other."""

    config: EngineConfig
    path: str
    index: int
    count: int
    meeting: str
    log_format: str


class Joined(msgspec.Struct, frozen=True, tag=True):
    """It has found the others."""


class Loading(msgspec.Struct, frozen=True, tag=True):
    """Of layers, or of recorded steps."""

    done: int
    total: int
    recording: bool = False


class Started(msgspec.Struct, frozen=True, tag=True):
    """It can compute. ``patience_s`` is how long a step may take at most; None: any time."""

    plan: EnginePlan
    model: ModelConfig
    comparison: list[Line]
    tile_tokens: int
    run_ahead: int
    device: str
    patience_s: float | None


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The user must change something; the text is for the user."""

    message: str


class Step(msgspec.Struct, frozen=True, tag=True):
    """``tells_late``: the first rank answers at once with Submitted."""

    batch: ScheduledBatch
    tells_late: bool = False


class Read(msgspec.Struct, frozen=True, tag=True):
    """To the first rank: the result of the oldest step that was not read yet."""


class Submitted(msgspec.Struct, frozen=True, tag=True):
    late: list[str]


class Result(msgspec.Struct, frozen=True, tag=True):
    output: StepOutput


ToRank = Begin | Step | Read
FromRank = Joined | Loading | Started | Failed | Submitted | Result

to_rank = msgspec.msgpack.Decoder(ToRank)
from_rank = msgspec.msgpack.Decoder(FromRank)
encode = msgspec.msgpack.Encoder().encode

"""What the processes of a cluster say to each other. Nothing but these types is ever decoded.

front end -> worker       Hello, then Add, Abort, Leave, Ping, AskFiles
worker    -> front end    Card once it is ready, News always, Files if asked
front end -> upstream     Hello, Ping, Fetch, Drop
upstream  -> front end    Alive, Part
worker    -> controller   Beat, once a second and whenever something changes; Bye
front end -> controller   Ask, and who watches: fastqwen status
controller -> all         Heard to a worker, Members to who asked
anyone with the token     Drain, by the controller to a worker
"""

from __future__ import annotations

import msgspec

from fastqwen.client.engine import Ready, State
from fastqwen.cluster.machine import Machine
from fastqwen.config import EngineConfig
from fastqwen.engine.core import EngineStats
from fastqwen.model_config import ModelConfig
from fastqwen.records import EngineRequest, RequestDelta

PROTOCOL = (
    1  # of workers and front ends that can talk to each other; raised with each change of these types or of records
)

BEAT_EVERY_S = 1.0
NEWS_EVERY_S = 0.5
LOST_AFTER_S = 3.0  # of silence
PEER_LOST_AFTER_S = 6.0  # a worker waits longer for a front end, so that it is not the first to give up
MAX_MESSAGE_BYTES = 256 * 2**20


class Hello(msgspec.Struct, frozen=True, tag=True):
    protocol: int = PROTOCOL


class Add(msgspec.Struct, frozen=True, tag=True):
    requests: list[EngineRequest]


class Abort(msgspec.Struct, frozen=True, tag=True):
    request_ids: list[str]


class Leave(msgspec.Struct, frozen=True, tag=True):
    request_ids: list[str]


class Ping(msgspec.Struct, frozen=True, tag=True):
    pass


class AskFiles(msgspec.Struct, frozen=True, tag=True):
    pass


class Card(msgspec.Struct, frozen=True, tag=True):
    """A replica's model. Replicas of equal ``identity`` give equal answers, so one can go on where another stopped."""

    protocol: int
    config: EngineConfig
    ready: Ready
    identity: str


class News(msgspec.Struct, frozen=True, tag=True):
    """``number`` counts up for each front end: one that misses a number has missed tokens."""

    number: int
    deltas: list[RequestDelta]
    state: State
    is_draining: bool
    stats: EngineStats
    others_tokens: float  # outstanding, of requests of other front ends
    num_restarts: int
    engine_silent_s: float


class Files(msgspec.Struct, frozen=True, tag=True):
    """A model's small files: all that its text side needs."""

    model: ModelConfig
    files: dict[str, bytes]


class Member(msgspec.Struct, frozen=True, kw_only=True):
    """A worker, as it describes itself."""

    key: str  # of this process and no other, ever
    address: str  # host:port
    names: list[str]
    kind: str  # "engine", or "upstream": any OpenAI-compatible server
    state: State
    is_draining: bool = False
    host: str = ""
    pid: int = 0
    version: str = ""
    device: str = ""
    num_running: int = 0
    num_waiting: int = 0
    kv_usage: float = 0.0
    max_model_len: int | None = None
    weights_bytes: int = 0
    kv_bytes: int = 0
    started_s: float = 0.0  # as time.time()
    machine: Machine = Machine()


class Beat(msgspec.Struct, frozen=True, tag=True):
    member: Member


class Bye(msgspec.Struct, frozen=True, tag=True):
    key: str


class Heard(msgspec.Struct, frozen=True, tag=True):
    drain: bool = False


class Ask(msgspec.Struct, frozen=True, tag=True):
    pass


class Drain(msgspec.Struct, frozen=True, tag=True):
    """``which``: a member's key, its address, or a model's name, which means all its workers."""

    which: str


class Members(msgspec.Struct, frozen=True, tag=True):
    members: list[Member]
    silent_s: list[float]  # of each
    controller_since_s: float  # as time.time()
    num_drained: int = 0  # by the Drain that this answers
    ray_address: str = ""  # HOST:PORT of the controller's Ray; 0.0.0.0 is the controller's host. Empty: it has none


class Fetch(msgspec.Struct, frozen=True, tag=True):
    """A request for the server behind a worker of kind "upstream". The path is one of the API's, never an address."""

    number: int
    path: str
    body: bytes
    hops: int = 1  # workers of this kind that it has come through, this one included


class Drop(msgspec.Struct, frozen=True, tag=True):
    """Nobody waits for this answer any more."""

    number: int


class Part(msgspec.Struct, frozen=True, tag=True):
    """What came of an answer. The last one ends it; an ``error`` instead says why there is no more."""

    number: int
    status: int = 200
    kind: str = ""  # Content-Type
    data: bytes = b""
    is_last: bool = False
    error: str = ""


class Alive(msgspec.Struct, frozen=True, tag=True):
    state: State
    is_draining: bool


ToUpstream = Hello | Ping | Fetch | Drop
FromUpstream = Alive | Part
ToWorker = Hello | Add | Abort | Leave | Ping | AskFiles
FromWorker = Card | News | Files
ToController = Beat | Bye | Ask | Drain
FromController = Heard | Members

to_worker = msgspec.msgpack.Decoder(ToWorker)
from_worker = msgspec.msgpack.Decoder(FromWorker)
to_controller = msgspec.msgpack.Decoder(ToController)
from_controller = msgspec.msgpack.Decoder(FromController)
to_upstream = msgspec.msgpack.Decoder(ToUpstream)
from_upstream = msgspec.msgpack.Decoder(FromUpstream)
encode = msgspec.msgpack.Encoder().encode

"""Which servers of this user run on this machine: each leaves a note while it runs."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec

from fastqwen.paths import state_dir

UNLISTED = "FASTQWEN_UNLISTED"  # set for a server that another command starts for itself


class Running(msgspec.Struct, frozen=True, kw_only=True):
    pid: int
    url: str
    model: str
    started_s: float  # as time.time()
    wants_key: bool


@contextmanager
def announced(server: Running) -> Iterator[None]:
    """``running`` finds it meanwhile. A folder that cannot be written to keeps no server from running."""
    if os.environ.get(UNLISTED):
        yield
        return
    note = state_dir() / "servers" / f"{server.pid}.json"
    with contextlib.suppress(OSError):
        note.parent.mkdir(exist_ok=True)
        note.write_bytes(msgspec.json.encode(server))
    try:
        yield
    finally:
        note.unlink(missing_ok=True)


def running() -> list[Running]:
    """Those whose process lives, the newest first. The notes of those that were killed are removed."""
    found = []
    for note in (state_dir() / "servers").glob("*.json"):
        try:
            server = msgspec.json.decode(note.read_bytes(), type=Running)
            os.kill(server.pid, 0)
        except (msgspec.DecodeError, ProcessLookupError):
            note.unlink(missing_ok=True)
        except OSError:
            continue  # it ended meanwhile, or is somebody else's
        else:
            found.append(server)
    return sorted(found, key=lambda one: -one.started_s)

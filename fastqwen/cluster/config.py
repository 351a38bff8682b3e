"""What the operator wishes of a cluster's processes. CLI flags are made from the fields that have a help text."""

from __future__ import annotations

from typing import Annotated, ClassVar

import msgspec

from fastqwen.config import check_bounds, option
from fastqwen.server.config import ServerConfig

CONTROLLER_PORT, WORKER_PORT = 21001, 21002  # FastChat's
RANKS_PORT, MEETING_PORT = 21003, 21004
RAY_PORT = 6379  # Ray's own


class WorkerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Raises BadConfig, naming the flag, for a value that cannot work."""

    controller: Annotated[str, option("HOST:PORT of the controller.")] = f"127.0.0.1:{CONTROLLER_PORT}"
    host: Annotated[
        str | None, option("Address to listen on. Default: the one that this machine reaches the controller from.")
    ] = None
    port: Annotated[int, option("Port to listen on; 0 takes any free one.", ge=0, le=65535)] = WORKER_PORT
    worker_address: Annotated[
        str | None, option("HOST:PORT at which front ends reach this worker, where that is not --host and --port.")
    ] = None
    rank_hosts: Annotated[
        list[str],
        option(
            "HOST:PORT of `fastqwen ranks` on another machine that computes its share of --tensor-parallel-size; once for "
            "each. This one computes the same share."
        ),
    ] = []
    ranks_port: Annotated[
        int,
        option(
            "With --rank-hosts: port here at which the ranks of all hosts meet; 0 takes any free one.", ge=0, le=65535
        ),
    ] = MEETING_PORT
    drain_timeout_s: Annotated[
        float,
        option(
            "Seconds that running requests get to finish after Ctrl-C or SIGTERM; the rest goes on at other workers.",
            ge=0,
        ),
    ] = 60.0
    log_format: Annotated[str, option("text or json.")] = "text"

    def __post_init__(self) -> None:
        check_bounds(self)


class PageConfig(ServerConfig, frozen=True, kw_only=True):
    """``fastqwen web --controller``: the front of ``api``, with the page's keys."""

    key_flag: ClassVar[str] = "--page-key"
    key_variable: ClassVar[str] = "FASTQWEN_PAGE_KEY"
    other_key_variables: ClassVar[tuple[str, ...]] = ()

"""What the operator wishes of a server."""

from __future__ import annotations

from dataclasses import dataclass, field

from fastqwen.server.request_limits import RequestLimits


@dataclass(frozen=True)
class ServerConfig:
    """Wishes about the server, as opposed to the engine."""

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    insecure: bool = False
    max_body_bytes: int = 32 * 2**20
    max_concurrent_requests: int = 1024
    limits: RequestLimits = field(default_factory=RequestLimits)
    text_timeout_s: float = 2.0
    text_workers: int = 2
    header_timeout_s: float = 10.0
    body_timeout_s: float = 30.0
    stall_timeout_s: float = 60.0
    ready_within_s: float = 30.0
    drain_timeout_s: float = 60.0
    strict_model_name: bool = False
    access_log: bool = True
    log_format: str = "text"

"""Part of vLLM's module layout: addresses of this machine."""

from __future__ import annotations

import socket

__all__ = ["get_ip", "get_open_port"]


def get_ip() -> str:
    """The one that others on the network reach; no packet is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
            return str(probe.getsockname()[0])
        except OSError:
            return "127.0.0.1"


def get_open_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])

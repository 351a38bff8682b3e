"""Hosts of a test: network namespaces with addresses of their own, as other machines would have them. Needs root."""

from __future__ import annotations

import os
import subprocess

import psutil


class Host:
    """``cut`` and ``join`` are its cable, which leads to this machine, or to a switch that other hosts are on as well."""

    def __init__(self, number: int, switch: Switch | None = None) -> None:
        self._name = f"fq{os.getpid()}-{number}"
        self._link = f"fq{os.getpid() % 100000}-{number}"  # names of interfaces are short
        self._switch = switch
        self.gateway, self.address = f"10.213.{number}.1", f"10.213.{number}.2"
        if switch is not None:
            self.gateway, self.address = switch.address, f"{switch.network}.{number + 1}"
        self.enter = ("ip", "netns", "exec", self._name)

    def __enter__(self) -> Host:
        _ip("netns", "add", self._name)
        _ip("link", "add", self._link, "type", "veth", "peer", "name", "eth0", "netns", self._name)
        if self._switch is None:
            _ip("addr", "add", f"{self.gateway}/24", "dev", self._link)
        else:
            _ip("link", "set", self._link, "master", self._switch.name)
        _ip("link", "set", self._link, "up")
        _ip("-n", self._name, "addr", "add", f"{self.address}/24", "dev", "eth0")
        _ip("-n", self._name, "link", "set", "eth0", "up")
        _ip("-n", self._name, "link", "set", "lo", "up")
        _ip("-n", self._name, "route", "add", "default", "via", self.gateway)
        return self

    def __exit__(self, *_: object) -> None:
        _ip("netns", "del", self._name)

    def cut(self) -> None:
        _ip("link", "set", self._link, "down")

    def join(self) -> None:
        _ip("link", "set", self._link, "up")

    def processes(self) -> list[psutil.Process]:
        """All that run there, whoever started them."""
        return [psutil.Process(int(pid)) for pid in _ip("netns", "pids", self._name).split()]


class Switch:
    """What hosts are plugged into, and this machine with them."""

    network = "10.214.0"

    def __init__(self) -> None:
        self.name = f"fq{os.getpid() % 100000}-sw"
        self.address = f"{self.network}.1"

    def __enter__(self) -> Switch:
        _ip("link", "add", self.name, "type", "bridge")
        _ip("addr", "add", f"{self.address}/24", "dev", self.name)
        _ip("link", "set", self.name, "up")
        return self

    def __exit__(self, *_: object) -> None:
        _ip("link", "del", self.name)


def _ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=30).stdout


def can_make_hosts() -> bool:
    try:
        with Switch() as switch, Host(98, switch):
            return True
    except (OSError, subprocess.SubprocessError):
        return False

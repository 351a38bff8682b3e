"""How ranks of several hosts add up and gather.

On CPUs over connections that hang on the cluster's token, like all others. Between GPUs NCCL does it, in clear: the network
between such hosts must be a private one.
"""

from __future__ import annotations

import os
import socket as sockets
import struct
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import zmq
from torch import Tensor
from zmq.utils.monitor import parse_monitor_message

from fastqwen.cluster.secret import secure_client, secure_server
from fastqwen.cluster.sockets import endpoint, own_address, split_address
from fastqwen.errors import FastqwenError
from fastqwen.ranks.world import GlooWorld, NcclWorld
from fastqwen.sharding import World

MEET_WITHIN_S = 100.0  # less than what the group waits for a silent rank while it loads
HEARTBEAT_MS, GONE_AFTER_MS = 2000, 6000
GET_INTERFACE_ADDRESS = 0x8915  # SIOCGIFADDR of Linux


def join(index: int, count: int, device: torch.device, meeting: Path, *, address: str, token: str) -> World:
    """Waits until all have come to ``address``, host:port, where the first rank listens. Raises FastqwenError."""
    del meeting  # a file, of one host only
    host, port = split_address(address, 0, "--ranks-port")
    if device.type == "cpu":
        return StarWorld(index, count, host, port, token)
    os.environ["NCCL_SOCKET_IFNAME"] = _interface(host if index == 0 else own_address(host, port))
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    store = dist.TCPStore(host, port, count, is_master=index == 0)  # type: ignore[attr-defined]
    dist.init_process_group("nccl", store=store, rank=index, world_size=count, device_id=device)
    return DistantNcclWorld(index, count, device)


class DistantNcclWorld(NcclWorld):
    """NCCL alone: GPUs of different hosts do not reach each other's memory."""

    def prepare(self, width: int, dtype: torch.dtype) -> None: ...


class StarWorld(GlooWorld):
    """The first rank listens, all others call it, and it passes on what each of them says. Sums are GlooWorld's, so their
    bits are those that ranks of one host get. A connection that breaks ends this process, and with it the group."""

    def __init__(self, index: int, count: int, host: str, port: int, token: str) -> None:
        super().__init__(index, count)
        self._context = zmq.Context()
        self._socket: Any = self._context.socket(zmq.DEALER if index else zmq.ROUTER)
        for option, value in (
            (zmq.SNDHWM, 0), (zmq.RCVHWM, 0), (zmq.LINGER, 1000), (zmq.IPV6, 1),
            (zmq.HEARTBEAT_IVL, HEARTBEAT_MS), (zmq.HEARTBEAT_TIMEOUT, GONE_AFTER_MS),
        ):  # fmt: skip
            self._socket.setsockopt(option, value)
        self._meet(host, port, token)
        self._monitor: Any = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self._poller = zmq.Poller()
        for one in (self._socket, self._monitor):
            self._poller.register(one, zmq.POLLIN)

    def _meet(self, host: str, port: int, token: str) -> None:
        """All say hello to the first, which answers once it has heard all."""
        if self.index:
            self._socket.setsockopt(zmq.ROUTING_ID, _name(self.index))
            secure_client(self._socket, token)
            self._socket.connect(endpoint(host, port))
            self._socket.send(b"")
            self._await(host, port)
            self._socket.recv()
            return
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        secure_server(self._socket, token)
        try:
            self._socket.bind(endpoint(host, port))
        except zmq.ZMQError as error:
            raise FastqwenError(
                f"the first rank cannot listen on {host} port {port}: {error.strerror}; use --ranks-port to choose another"
            ) from None
        missing = {_name(other) for other in self._others}
        while missing:
            self._await(host, port)
            missing.discard(self._socket.recv_multipart()[0])
        for other in self._others:
            self._socket.send_multipart([_name(other), b""])

    def _await(self, host: str, port: int) -> None:
        end_s = time.monotonic() + MEET_WITHIN_S
        while not self._socket.poll(1000):
            if time.monotonic() > end_s:
                raise FastqwenError(
                    f"the ranks did not meet at {host} port {port} within {MEET_WITHIN_S:.0f} s: can every host of "
                    "--rank-hosts reach it? --ranks-port chooses another"
                )

    @property
    def _others(self) -> range:
        return range(1, self.count)

    def broadcast(self, x: Tensor) -> None:
        if self.index:
            _put(x, self._receive()[-1])
            return
        for other in self._others:
            self._socket.send_multipart([_name(other), _name(0), _data(x)])

    def _parts(self, x: Tensor) -> list[Tensor]:
        x = x.contiguous()
        own = _data(x)
        parts = [x.clone() if shard == self.index else torch.empty_like(x) for shard in range(self.count)]
        if self.index:
            self._socket.send_multipart([_name(self.index), own])
            for _ in self._others:
                sender, data = self._receive()
                _put(parts[_number(sender)], data)
            return parts
        for other in self._others:
            self._socket.send_multipart([_name(other), _name(0), own])
        for _ in self._others:
            sender, _, data = self._receive()
            _put(parts[_number(sender)], data)
            for other in self._others:
                if _name(other) != sender:
                    self._socket.send_multipart([_name(other), sender, data])
        return parts

    def _receive(self) -> list[bytes]:
        while True:
            found = dict(self._poller.poll())
            if self._socket in found:
                message: list[bytes] = self._socket.recv_multipart()
                return message
            parse_monitor_message(self._monitor.recv_multipart())
            sys.exit("the connection to the other ranks broke")


def _name(index: int) -> bytes:
    return b"r%d" % index


def _number(name: bytes) -> int:
    return int(name[1:])


def _data(x: Tensor) -> bytes:
    data: bytes = x.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return data


def _put(x: Tensor, data: bytes) -> None:
    x.view(-1).view(torch.uint8).copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))


def _interface(address: str) -> str:
    """The name of the network interface with this address, for NCCL."""
    import fcntl

    with sockets.socket(sockets.AF_INET, sockets.SOCK_DGRAM) as probe:
        for _, name in sockets.if_nameindex():
            try:
                found = fcntl.ioctl(probe, GET_INTERFACE_ADDRESS, struct.pack("256s", name.encode()[:15]))
            except OSError:
                continue
            if sockets.inet_ntoa(found[20:24]) == sockets.gethostbyname(address):
                return name
    raise FastqwenError(f"no network interface here has the address {address} by which the other ranks are reached")

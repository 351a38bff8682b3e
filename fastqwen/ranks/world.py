"""How ranks add up and gather: gloo between processes on CPUs, NCCL between GPUs."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from fastqwen.kernels.cuda.all_reduce import PeerSum
from fastqwen.ranks.peers import open_peers, rows_faster
from fastqwen.sharding import World

log = logging.getLogger(__name__)


def join(index: int, count: int, device: torch.device, meeting: Path) -> World:
    """Waits until all have come. They meet in a file, so that no port has to be free, and talk within this host only."""
    for library in ("GLOO", "NCCL"):
        os.environ.setdefault(f"{library}_SOCKET_IFNAME", "lo")
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # multicast needs rights that containers often lack
    store = dist.FileStore(str(meeting), count)  # type: ignore[attr-defined]
    backend = "nccl" if device.type == "cuda" else "gloo"
    gpu = device if device.type == "cuda" else None
    dist.init_process_group(backend, store=store, rank=index, world_size=count, device_id=gpu)
    return GlooWorld(index, count) if gpu is None else NcclWorld(index, count, gpu)


class GlooWorld:
    """Sums are taken in the shards' order, so that a row's bits depend neither on the batch nor on which shard looks."""

    def __init__(self, index: int, count: int) -> None:
        self.index, self.count = index, count

    def all_reduce(self, x: Tensor) -> None:
        parts = self._parts(x)
        total = parts[0].float() if x.dtype in (torch.bfloat16, torch.float16) else parts[0]
        for part in parts[1:]:
            total += part
        x.copy_(total)

    def all_gather(self, x: Tensor) -> Tensor:
        return torch.cat(self._parts(x), dim=-1)

    def broadcast(self, x: Tensor) -> None:
        dist.broadcast(x, 0)

    def prepare(self, width: int, dtype: torch.dtype) -> None: ...

    def takes_parts(self, residual: Tensor) -> bool:
        return False

    def add_parts(self, residual: Tensor, part: Tensor) -> None:
        for one in self._parts(part):
            residual += one

    def _parts(self, x: Tensor) -> list[Tensor]:
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(self.count)]
        dist.all_gather(parts, x)
        return parts


class NcclWorld:
    """NCCL's sums, and for few rows our own where the GPUs reach each other's memory and it is faster."""

    def __init__(self, index: int, count: int, device: torch.device) -> None:
        self.index, self.count = index, count
        self._device = device
        self._peers: PeerSum | None = None
        self._peer_rows = 0  # up to so many rows

    def all_reduce(self, x: Tensor) -> None:
        dist.all_reduce(x)

    def all_gather(self, x: Tensor) -> Tensor:
        rows, width = x.shape
        parts = torch.empty((self.count, rows, width), dtype=x.dtype, device=x.device)
        dist.all_gather_into_tensor(parts.view(self.count * rows, width), x.contiguous())
        return parts.transpose(0, 1).reshape(rows, self.count * width)

    def broadcast(self, x: Tensor) -> None:
        dist.broadcast(x, 0)

    def prepare(self, width: int, dtype: torch.dtype) -> None:
        self._peers = open_peers(self, width, dtype, self._device)
        if self._peers is not None:
            self._peer_rows, told = rows_faster(self, self._peers, width, dtype, self._device)
            if self.index == 0:
                log.info("sums over %d GPUs, us by rows, ours and NCCL's: %s", self.count, told)

    def takes_parts(self, residual: Tensor) -> bool:
        return self._peers is not None and residual.shape[0] <= self._peer_rows and self._peers.takes(residual)

    def add_parts(self, residual: Tensor, part: Tensor) -> None:
        assert self._peers is not None
        self._peers.add(residual, part)

"""How ranks add up and gather: gloo between processes on CPUs, NCCL between GPUs."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from fastqwen.sharding import World


def join(index: int, count: int, device: torch.device, meeting: Path) -> World:
    """Waits until all have come. They meet in a file, so that no port has to be free, and talk within this host only."""
    for library in ("GLOO", "NCCL"):
        os.environ.setdefault(f"{library}_SOCKET_IFNAME", "lo")
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # multicast needs rights that containers often lack
    store = dist.FileStore(str(meeting), count)  # type: ignore[attr-defined]
    backend = "nccl" if device.type == "cuda" else "gloo"
    gpu = device if device.type == "cuda" else None
    dist.init_process_group(backend, store=store, rank=index, world_size=count, device_id=gpu)
    return NcclWorld(index, count) if gpu is not None else GlooWorld(index, count)


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

    def _parts(self, x: Tensor) -> list[Tensor]:
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(self.count)]
        dist.all_gather(parts, x)
        return parts


class NcclWorld:
    def __init__(self, index: int, count: int) -> None:
        self.index, self.count = index, count

    def all_reduce(self, x: Tensor) -> None:
        dist.all_reduce(x)

    def all_gather(self, x: Tensor) -> Tensor:
        rows, width = x.shape
        parts = torch.empty((self.count, rows, width), dtype=x.dtype, device=x.device)
        dist.all_gather_into_tensor(parts.view(self.count * rows, width), x.contiguous())
        return parts.transpose(0, 1).reshape(rows, self.count * width)

    def broadcast(self, x: Tensor) -> None:
        dist.broadcast(x, 0)

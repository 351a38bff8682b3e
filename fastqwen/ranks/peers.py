"""Whether the GPUs' own sums through each other's memory are there, right, and up to how many rows faster than NCCL's.

All ranks take the same way: each step of it ends with what they agree on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from fastqwen.kernels.cuda import all_reduce
from fastqwen.kernels.cuda.all_reduce import PeerSum
from fastqwen.kernels.cuda.nvrtc import CannotCompile
from fastqwen.runner.start import least
from fastqwen.sharding import World

log = logging.getLogger(__name__)

ROWS = (1, 2, 4, 8, 16, 32, 64)
CALLS, REPEATS = 20, 5  # of a recorded sequence whose time is taken


def open_peers(world: World, width: int, dtype: torch.dtype, device: torch.device) -> PeerSum | None:
    """None where there is no such thing; the first rank's log says why."""
    if not all_reduce.fits(width, dtype):
        return None

    def exchange(own: bytes) -> list[bytes]:
        line = torch.frombuffer(bytearray(own), dtype=torch.uint8)[None].to(device)
        return [bytes(one) for one in world.all_gather(line).view(world.count, len(own)).tolist()]

    peers, why = None, "another rank cannot"
    try:
        peers = PeerSum(width, dtype, index=world.index, count=world.count, device=device, exchange=exchange)
    except (RuntimeError, CannotCompile) as error:
        why = str(error).partition("\n")[0]
    if not least(int(peers is not None), device, world) or peers is None:
        log.warning("the GPUs do not add up through each other's memory (%s): NCCL does it", why)
        return None
    if not least(int(is_right(world, peers, width, dtype, device)), device, world):
        log.warning("sums through the GPUs' memory came out wrong: NCCL does them")
        return None
    return peers


def is_right(world: World, peers: PeerSum, width: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Several rounds, so that each buffer is used again, of changing sizes."""
    for turn, rows in enumerate((1, 64, 3, 8, 1, 17, 2)):
        generator = torch.Generator(device).manual_seed(turn)
        residual = torch.randn((rows, width), generator=generator, dtype=dtype, device=device)
        generator.manual_seed(1000 * turn + world.index)
        part = torch.randn((rows, width), generator=generator, dtype=dtype, device=device)
        part[:, ::7] = -0.0  # the buffers' own word for nothing
        parts = world.all_gather(part).view(rows, world.count, width)
        expected = (parts.float().sum(1) + residual.float()).to(dtype)
        peers.add(residual, part)
        if peers.missed() or not torch.allclose(residual.float(), expected.float(), rtol=2**-7, atol=1e-3):
            return False
    return True


def rows_faster(world: World, peers: PeerSum, width: int, dtype: torch.dtype, device: torch.device) -> tuple[int, str]:
    """Up to how many rows ours takes less time, and all times in words."""
    most, told = 0, []
    for rows in ROWS:
        residual = torch.zeros((rows, width), dtype=dtype, device=device)
        part = torch.zeros_like(residual)
        ours_us = recorded_us(lambda residual=residual, part=part: peers.add(residual, part), world, device)  # type: ignore[misc]
        nccl_us = recorded_us(lambda residual=residual: world.all_reduce(residual), world, device)  # type: ignore[misc]
        told.append(f"{rows}: {ours_us:.1f} {nccl_us:.1f}")
        if least(int(ours_us < nccl_us), device, world) and most == (ROWS[ROWS.index(rows) - 1] if most else 0):
            most = rows
    return most, ", ".join(told)


def recorded_us(call: Callable[[], Tensor | None], world: World, device: torch.device) -> float:
    """Microseconds of one call in a recorded sequence, as the engine's steps have them; the best of several."""
    call()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(CALLS):
            call()
    times: list[float] = []
    for _ in range(1 + REPEATS):
        least(0, device, world)  # all begin together
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize(device)
        times.append(begin.elapsed_time(end) * 1e3 / CALLS)
    return min(times[1:])

"""What this machine can do at best, measured in the same run as everything that is compared with it."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import torch

CPU_READ_BYTES = 512 * 2**20
GPU_READ_BYTES = 4 * 2**30
CPU_MATMUL_SIZE = 2048
GPU_MATMUL_SIZE = 8192
REPEATS = 7


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """``read_gb_s``: sum over a large tensor; ``matmul_tflops``: one large product in the model's type. Best of seven."""

    name: str
    threads: int | None
    torch: str
    python: str
    dtype: str
    read_gb_s: float
    matmul_tflops: float


def measure(device: torch.device, dtype: str) -> Machine:
    on_gpu = device.type == "cuda"
    return Machine(
        name=torch.cuda.get_device_name(device) if on_gpu else _processor(),
        threads=None if on_gpu else torch.get_num_threads(),
        torch=str(torch.__version__),
        python=platform.python_version(),
        dtype=dtype,
        read_gb_s=_read_bytes_per_s(device) / 1e9,
        matmul_tflops=_flops_per_s(device, getattr(torch, dtype)) / 1e12,
    )


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _read_bytes_per_s(device: torch.device) -> float:
    if device.type == "cpu":
        data = torch.ones(CPU_READ_BYTES // 4)
    else:
        size = min(GPU_READ_BYTES, torch.cuda.mem_get_info(device)[0] // 4)
        data = torch.ones(size // 2, dtype=torch.float16, device=device)
    found = data.nbytes / _best_s(data.sum, device)
    _forget(device)
    return found


def _flops_per_s(device: torch.device, dtype: torch.dtype) -> float:
    size = CPU_MATMUL_SIZE if device.type == "cpu" else GPU_MATMUL_SIZE
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    found = 2 * size**3 / _best_s(lambda: left @ right, device)
    _forget(device)
    return found


def _best_s(work: Callable[[], object], device: torch.device) -> float:
    work()
    times = []
    for _ in range(REPEATS):
        synchronize(device)
        start_s = time.perf_counter()
        work()
        synchronize(device)
        times.append(time.perf_counter() - start_s)
    return min(times)


def _forget(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(errors="replace").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores"

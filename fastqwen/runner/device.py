"""The device, its facts, and the Ops table that it computes with."""

from __future__ import annotations

import logging
from functools import cache

import torch

from fastqwen.config import EngineConfig
from fastqwen.errors import BadConfig
from fastqwen.kernels import Ops
from fastqwen.kernels.limits import emulated_capability
from fastqwen.plan import DeviceFacts
from fastqwen.plan.facts import CONTEXT_BYTES_PER_MULTIPROCESSOR, MIB
from fastqwen.plan.generations import generation_of
from fastqwen.plan.gpus import data_sheet
from fastqwen.plan.host import host_facts
from fastqwen.runner.accelerator import why_no_gpu

log = logging.getLogger(__name__)

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CACHE_DTYPES = {**TORCH_DTYPES, "int8": torch.int8, "fp8": torch.float8_e4m3fn}


def choose_device(config: EngineConfig) -> torch.device:
    """Before anything is loaded. ``auto`` is the GPU if torch computes on it; if there is one and it does not, a line says
    why. Raises BadConfig."""
    reason = None if config.device == "cpu" else why_no_gpu()
    if config.device == "cuda" and reason is not None:
        raise BadConfig(f"--device is cuda, but {reason or 'torch sees no GPU here'}: use --device cpu")
    if config.device == "cpu" or reason is not None:
        if reason:
            _warn_once(f"{reason}. Computing on the CPU.")
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


@cache
def _warn_once(text: str) -> None:
    log.warning("%s", text)


def has_own_kernels(device: torch.device) -> bool:
    """Whether steps on a GPU go through our kernels and are recorded; on the oldest it is torch's operations alone."""
    return device.type == "cuda" and not generation_of(_capability(device)).is_torch_only


def _capability(device: torch.device) -> tuple[int, int]:
    return emulated_capability() or torch.cuda.get_device_capability(device)


def device_facts(device: torch.device) -> DeviceFacts:
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
        own = multiprocessors * CONTEXT_BYTES_PER_MULTIPROCESSOR + torch.cuda.memory_reserved(device)
        name = torch.cuda.get_device_name(device)
        sheet = data_sheet(name, total // MIB)
        return DeviceFacts(
            kind="cuda",
            name=name,
            total_bytes=total,
            free_bytes=min(total, free + own),  # what other processes leave
            compute_capability=_capability(device),
            multiprocessors=multiprocessors,
            bandwidth_gb_s=sheet.bandwidth_gb_s if sheet else None,
            matmul_tflops=sheet.matmul_tflops if sheet else None,
        )
    return host_facts()


def choose_ops(device: torch.device) -> Ops:
    from fastqwen.kernels.cpu import build
    from fastqwen.kernels.cpu.ops import CpuOps
    from fastqwen.kernels.reference import ReferenceOps

    if has_own_kernels(device):
        from fastqwen.kernels.triton.ops import TritonOps

        return TritonOps(device)
    if device.type == "cpu":
        library = build.load()
        if library is not None:
            return CpuOps(library)
    return ReferenceOps()

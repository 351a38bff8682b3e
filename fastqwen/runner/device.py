"""The device, its facts, and the Ops table that it computes with."""

from __future__ import annotations

import torch

from fastqwen.config import EngineConfig
from fastqwen.errors import BadConfig
from fastqwen.kernels import Ops
from fastqwen.plan import DeviceFacts
from fastqwen.plan.facts import CONTEXT_BYTES_PER_MULTIPROCESSOR, MIB
from fastqwen.plan.gpus import data_sheet, host_facts

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(config: EngineConfig) -> torch.device:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise BadConfig("--device is cuda, but torch sees no GPU here: use --device cpu")
    if config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available()):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def device_facts(device: torch.device) -> DeviceFacts:
    if device.type == "cuda":
        from fastqwen.kernels.triton.launch import card_of

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
            compute_capability=card_of(device).capability,
            multiprocessors=multiprocessors,
            bandwidth_gb_s=sheet.bandwidth_gb_s if sheet else None,
            matmul_tflops=sheet.matmul_tflops if sheet else None,
        )
    return host_facts()


def choose_ops(device: torch.device) -> Ops:
    from fastqwen.kernels.cpu import build
    from fastqwen.kernels.cpu.ops import CpuOps
    from fastqwen.kernels.reference import ReferenceOps

    if device.type == "cuda":
        from fastqwen.kernels.triton.ops import TritonOps

        return TritonOps(device)
    if device.type == "cpu":
        library = build.load()
        if library is not None:
            return CpuOps(library)
    return ReferenceOps()

"""Sums over the GPUs of one host for few rows, through each other's memory; see all_reduce.cu."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fastqwen.kernels import Norm
from fastqwen.kernels.cuda import driver, nvrtc

SOURCES = ("primitives.cuh", "all_reduce.cu")
KERNEL = "all_reduce"
TYPES = {torch.float16: "Fp16", torch.bfloat16: "Bf16"}
MOST_ROWS = 64
BUFFERS = 3
VECTOR = 8  # numbers
MOST_THREADS, MOST_VECTORS = 1024, 4  # of a block, and of a thread
NOTHING = -2147450880  # 0x80008000 as int32
MISSED = 2 + BUFFERS  # where the state says that something never came
PATIENCE = 2**24  # looks; some seconds

Exchange = Callable[[bytes], list[bytes]]


class Args(ctypes.Structure):
    """``Args`` of all_reduce.cu."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("part", "residual", "norm", "normed", "buffers", "state")),
        *((name, ctypes.c_int) for name in ("rows", "vectors", "most_rows", "index", "count")),
        ("patience", ctypes.c_uint),
        ("eps", ctypes.c_float),
    ]


def fits(width: int, dtype: torch.dtype) -> bool:
    return dtype in TYPES and width % VECTOR == 0 and width <= VECTOR * MOST_THREADS * MOST_VECTORS


class PeerSum:
    """Every GPU makes the same calls in the same order, also in recorded steps: the round is counted on the device."""

    def __init__(
        self, width: int, dtype: torch.dtype, *, index: int, count: int, device: torch.device, exchange: Exchange
    ) -> None:
        """``exchange`` gives every GPU's bytes, in their order, to each of them. Raises RuntimeError where a GPU cannot
        reach another one's memory, CannotCompile without a compiler."""
        assert fits(width, dtype)
        self._dtype, self._vectors = dtype, width // VECTOR
        self._index, self._count = index, count
        source = "\n".join((Path(__file__).parent / name).read_text() for name in SOURCES)
        code = nvrtc.machine_code(source, {"TYPE": TYPES[dtype]}, torch.cuda.get_device_capability(device))
        warps = -(-self._vectors // 32)
        turns = -(-warps * 32 // MOST_THREADS)
        self._kernel = driver.Kernel(driver.load(code), KERNEL, 0, -(-warps // turns) * 32)
        num_words = BUFFERS * count * MOST_ROWS * self._vectors * 4
        own = driver.allocate(num_words * 4)
        driver.fill(own, NOTHING, num_words)
        torch.cuda.synchronize(device)
        handles = exchange(driver.handle_of(own))
        addresses = [own if one == index else driver.open_handle(handle) for one, handle in enumerate(handles)]
        self._buffers = torch.tensor(addresses, dtype=torch.int64, device=device)
        self._state = torch.zeros(MISSED + 1, dtype=torch.int32, device=device)

    def takes(self, residual: Tensor) -> bool:
        return residual.dtype == self._dtype and residual.shape[0] <= MOST_ROWS and residual.is_contiguous()

    def add(self, residual: Tensor, part: Tensor, norm: Norm | None = None) -> Tensor | None:
        """residual [rows, width] += all GPUs' part [rows, width], in place; gives rms_norm of that if ``norm`` is given."""
        rows = residual.shape[0]
        part = part.contiguous()
        normed = None if norm is None else torch.empty_like(residual)
        args = Args(
            part=part.data_ptr(),
            residual=residual.data_ptr(),
            norm=None if norm is None else norm.weight.data_ptr(),
            normed=None if normed is None else normed.data_ptr(),
            buffers=self._buffers.data_ptr(),
            state=self._state.data_ptr(),
            rows=rows,
            vectors=self._vectors,
            most_rows=MOST_ROWS,
            index=self._index,
            count=self._count,
            patience=PATIENCE,
            eps=0.0 if norm is None else norm.eps,
        )
        self._kernel.launch(rows, args, overlap=False)
        return normed

    def missed(self) -> bool:
        """Whether another GPU's part never came. Waits for the device."""
        return bool(self._state[MISSED])

"""Machine code to functions of the device, and their launches, by the CUDA driver's own interface (CUDA Driver API)."""

from __future__ import annotations

import ctypes
from functools import cache

import torch

MAX_DYNAMIC_SHARED_SIZE_BYTES = 8  # CUfunction_attribute
PROGRAMMATIC_STREAM_SERIALIZATION = 6  # CUlaunchAttributeID


class _Attribute(ctypes.Structure):
    _fields_ = [
        ("id", ctypes.c_int),
        ("padding", ctypes.c_int),
        ("value", ctypes.c_int),
        ("unused", ctypes.c_byte * 60),
    ]


class _Config(ctypes.Structure):
    """CUlaunchConfig"""

    _fields_ = [
        *(
            (name, ctypes.c_uint)
            for name in ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z", "shared_bytes")
        ),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("num_attributes", ctypes.c_uint),
    ]


_OVERLAP = (_Attribute * 1)(_Attribute(PROGRAMMATIC_STREAM_SERIALIZATION, 0, 1))


class Kernel:
    """A function of a loaded module, with ``shared_bytes`` of shared memory for each block."""

    def __init__(self, module: ctypes.c_void_p, name: str, shared_bytes: int, num_threads: int) -> None:
        self._function = ctypes.c_void_p()
        self._shared_bytes, self._num_threads = shared_bytes, num_threads
        _check(_driver().cuModuleGetFunction(ctypes.byref(self._function), module, name.encode()))
        _check(_driver().cuFuncSetAttribute(self._function, MAX_DYNAMIC_SHARED_SIZE_BYTES, shared_bytes))

    def blocks_at_once(self) -> int:
        """How many blocks a multiprocessor holds."""
        found = ctypes.c_int()
        _check(
            _driver().cuOccupancyMaxActiveBlocksPerMultiprocessor(
                ctypes.byref(found), self._function, self._num_threads, ctypes.c_size_t(self._shared_bytes)
            )
        )
        return found.value

    def launch(self, blocks: int, args: ctypes.Structure, *, overlap: bool) -> None:
        """``overlap``: it may start before the kernel in front has ended, and waits for that itself."""
        config = _Config(
            *(blocks, 1, 1, self._num_threads, 1, 1, self._shared_bytes),
            stream=torch.cuda.current_stream().cuda_stream,
            attributes=_OVERLAP,
            num_attributes=int(overlap),
        )
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(args))
        _check(_driver().cuLaunchKernelEx(ctypes.byref(config), self._function, pointers, None))


def load(machine_code: bytes) -> ctypes.c_void_p:
    """A module in the current device's context; it stays loaded."""
    module = ctypes.c_void_p()
    _check(_driver().cuModuleLoadData(ctypes.byref(module), machine_code))
    return module


class _Handle(ctypes.Structure):
    """CUipcMemHandle"""

    _fields_ = [("content", ctypes.c_ubyte * 64)]


def allocate(num_bytes: int) -> int:
    """Memory of its own, which other processes may open; it is kept for as long as this one lives."""
    address = ctypes.c_uint64()
    _check(_driver().cuMemAlloc_v2(ctypes.byref(address), ctypes.c_size_t(num_bytes)))
    return address.value


def fill(address: int, word: int, count: int) -> None:
    """``count`` words of 32 bits."""
    _check(_driver().cuMemsetD32_v2(ctypes.c_uint64(address), ctypes.c_uint(word & 0xFFFFFFFF), ctypes.c_size_t(count)))


def handle_of(address: int) -> bytes:
    """By which another process of this host opens the memory."""
    handle = _Handle()
    _check(_driver().cuIpcGetMemHandle(ctypes.byref(handle), ctypes.c_uint64(address)))
    return bytes(handle.content)


def open_handle(handle: bytes) -> int:
    """Its address here; raises RuntimeError where the GPUs cannot reach each other."""
    address, access_when_needed = ctypes.c_uint64(), 1
    _check(
        _driver().cuIpcOpenMemHandle_v2(
            ctypes.byref(address), _Handle((ctypes.c_ubyte * 64)(*handle)), ctypes.c_uint(access_when_needed)
        )
    )
    return address.value


@cache
def _driver() -> ctypes.CDLL:
    torch.cuda.current_stream()  # torch makes the device's context
    return ctypes.CDLL("libcuda.so.1")


def _check(code: int) -> None:
    if code:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(code, ctypes.byref(text))
        raise RuntimeError(f"CUDA driver: {(text.value or b'unknown error').decode()} ({code})")

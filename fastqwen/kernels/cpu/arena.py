"""Memory for weights in large pages.

With pages of 4 KiB a processor must look up where the next one is every 64 cache lines, and stops fetching ahead at each
one's end; inside a virtual machine that costs half of the bandwidth (docs/performance.md). Linux gives pages of 2 MiB to
whoever asks for them. Matrices are smaller than such a page, so they are laid one after the other, in the order in which
they are loaded, which is also that in which a step reads them.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

LARGE_PAGE = 2 * 2**20
CHUNK = 16 * LARGE_PAGE
LINE = 64  # bytes that the processor reads at once


class Arena:
    """Tensors keep the memory that they lie in; it is given back when the last tensor of a chunk is gone."""

    def __init__(self) -> None:
        self._left = torch.empty(0, dtype=torch.uint8)
        self._taking = threading.Lock()

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """As torch.empty, on the host."""
        num_bytes = math.prod(shape) * dtype.itemsize
        taken = -(-num_bytes // LINE) * LINE
        if taken > CHUNK:
            return _chunk(num_bytes)[:num_bytes].view(dtype).view(*shape)
        with self._taking:
            if taken > len(self._left):
                self._left = _chunk(CHUNK)
            found, self._left = self._left[:num_bytes], self._left[taken:]
        return found.view(dtype).view(*shape)

    def copy(self, tensor: Tensor) -> Tensor:
        return self.empty(tensor.shape, tensor.dtype).copy_(tensor)


def _chunk(num_bytes: int) -> Tensor:
    """uint8 [at least num_bytes], from the beginning of a large page on; what nobody writes to takes no memory."""
    size = -(-num_bytes // LARGE_PAGE) * LARGE_PAGE
    if not hasattr(mmap, "MADV_HUGEPAGE"):  # not Linux
        return torch.empty(size, dtype=torch.uint8)
    memory = mmap.mmap(-1, size + LARGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel may be built without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    found = torch.frombuffer(memory, dtype=torch.uint8)
    begin = -found.data_ptr() % LARGE_PAGE
    return found[begin : begin + size]

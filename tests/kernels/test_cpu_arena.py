"""Memory in large pages: tensors that are like others, and share nothing but pages."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some

from fastqwen.kernels.cpu import arena
from fastqwen.kernels.cpu.arena import Arena

TYPES = [torch.uint8, torch.float16, torch.float32, torch.int64]


@given(some.lists(some.tuples(some.integers(0, 900), some.integers(1, 1200), some.sampled_from(TYPES)), max_size=12))
def test_what_is_written_to_one_is_not_seen_in_another(shapes: list[tuple[int, int, torch.dtype]]) -> None:
    memory = Arena()
    found = [memory.empty((rows, columns), dtype) for rows, columns, dtype in shapes]
    for index, (tensor, (rows, columns, dtype)) in enumerate(zip(found, shapes, strict=True)):
        assert tensor.shape == (rows, columns) and tensor.dtype == dtype and tensor.is_contiguous()
        assert tensor.data_ptr() % arena.LINE == 0
        tensor.fill_(index + 1)
    for index, tensor in enumerate(found):
        assert bool((tensor == index + 1).all())


def test_what_is_larger_than_a_chunk_has_memory_of_its_own() -> None:
    memory = Arena()
    small = memory.copy(torch.arange(5))
    large = memory.empty((arena.CHUNK + 1,), torch.uint8)
    last = memory.copy(torch.arange(5, 9))
    large[-1], large[0] = 7, 9
    assert small.tolist() == [0, 1, 2, 3, 4] and last.tolist() == [5, 6, 7, 8] and large[[0, -1]].tolist() == [9, 7]
    assert last.data_ptr() - small.data_ptr() == arena.LINE
    assert large.data_ptr() % arena.LARGE_PAGE == 0


def test_a_tensor_keeps_its_memory() -> None:
    kept = Arena().copy(torch.arange(1000))
    assert kept.equal(torch.arange(1000))


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="asks as Linux does")
def test_large_pages_are_asked_for() -> None:
    """``hg`` among the flags of the mapping, whatever the system makes of it."""
    tensor = Arena().copy(torch.zeros(10))
    flags = ""
    for line in Path("/proc/self/smaps").read_text().splitlines():
        bounds = line.split()[0].split("-")
        if len(bounds) == 2:
            begin, end = (int(bound, 16) for bound in bounds)
            inside = begin <= tensor.data_ptr() < end
        elif line.startswith("VmFlags:") and inside:
            flags = line
    assert "hg" in flags.split()

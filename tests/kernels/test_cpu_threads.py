"""Every CPU kernel is computed by all threads that were asked for, and torch's do not stand in their way."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from fastqwen.kernels import AttentionParts, DenseWeight, HeadShape, Norm
from fastqwen.kernels.cpu import build
from fastqwen.kernels.cpu.ops import CpuOps
from tests.kernels import test_cpu_packed, test_cpu_scaled
from tests.kernels.batches import make_batch

TASKS = Path("/proc/self/task")
PATIENCE_S = 30.0
SHAPE = HeadShape(8, 2, 64, 64)


def linear(ops: CpuOps) -> Callable[[], object]:
    x, weight = torch.randn(256, 256), DenseWeight(torch.randn(1024, 256))
    return lambda: ops.linear(x, weight)


def packed(ops: CpuOps) -> Callable[[], object]:
    x, product = torch.randn(64, 256), ops.coded(test_cpu_packed.make_weight("Q4_1", 1024, 256))
    return lambda: product.plain(x)


def scaled(ops: CpuOps) -> Callable[[], object]:
    x, product = torch.randn(64, 256), ops.packed(test_cpu_scaled.make_weight(1024, 256, (128, 128)), torch.bfloat16)
    assert product is not None
    return lambda: product.plain(x)


def attention(ops: CpuOps) -> Callable[[], object]:
    step, cache = make_batch([(0, 300)], SHAPE)
    qkv = torch.randn(300, SHAPE.width)
    return lambda: ops.attend(qkv, step, cache, AttentionParts(SHAPE))


def norm(ops: CpuOps) -> Callable[[], object]:
    x, weight = torch.randn(4096, 256), Norm(torch.ones(256), 1e-6)
    return lambda: ops.rms_norm(x, weight)


@pytest.fixture
def ops() -> Iterator[CpuOps]:
    library = build.load()
    assert library is not None, "the tests need g++"
    ops = CpuOps(library)
    ops.set_threads(2)
    yield ops
    ops.set_threads(torch.get_num_threads())


def time_of_others_ns() -> int:
    """Processor time of all threads but this one."""
    own = str(threading.get_native_id())
    return sum(int((task / "schedstat").read_text().split()[0]) for task in TASKS.iterdir() if task.name != own)


@pytest.mark.skipif(not (TASKS / str(os.getpid()) / "schedstat").exists(), reason="counts threads' time as Linux does")
@pytest.mark.parametrize("kernel", [linear, packed, scaled, attention, norm], ids=lambda kernel: kernel.__name__)
def test_a_kernel_has_all_threads(ops: CpuOps, kernel: Callable[[CpuOps], Callable[[], object]]) -> None:
    """Sources that each had a pool of their own computed alone for a while, to the same bits."""
    compute = kernel(ops)
    compute()
    before, end = time_of_others_ns(), time.monotonic() + PATIENCE_S
    worked = 0
    while time_of_others_ns() - before < 20e6:
        begin = time.thread_time_ns()
        compute()
        worked += time.thread_time_ns() - begin
        assert time.monotonic() < end and worked < 2e9, "the second thread has no part in it"


def test_torchs_threads_sleep_between_its_operations() -> None:
    asked = "import os, fastqwen; print(os.environ['OMP_WAIT_POLICY'])"
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    for own, expected in (({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")):
        run = subprocess.run(
            [sys.executable, "-c", asked], env=environment | own, capture_output=True, text=True, check=True
        )
        assert run.stdout.strip() == expected

"""The C++ ops against the reference, and the promise that a row's bits do not depend on its batch."""

from __future__ import annotations

import shutil

import pytest
import torch

from fastqwen.kernels import HeadShape, LayerCache
from fastqwen.kernels.cpu import build
from fastqwen.kernels.cpu.ops import CpuOps
from fastqwen.kernels.reference import ReferenceOps
from tests.kernels.batches import make_batch

REFERENCE = ReferenceOps()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def ops() -> CpuOps:
    assert shutil.which("g++"), "the tests need g++"
    library = build.load()
    assert library is not None
    return CpuOps(library)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "k", "n"), [(1, 64, 7), (5, 576, 64), (70, 40, 33), (3, 7, 5)])
def test_linear(ops: CpuOps, dtype: torch.dtype, tokens: int, k: int, n: int) -> None:
    x, weight, bias = torch.randn(tokens, k), torch.randn(n, k).to(dtype), torch.randn(n).to(dtype)
    expected = REFERENCE.linear(x, weight, bias)
    torch.testing.assert_close(ops.linear(x, weight, bias), expected, rtol=1e-4, atol=1e-4)
    residual = torch.randn(tokens, n)
    added = residual + expected
    ops.linear_add(residual, x, weight, bias)
    torch.testing.assert_close(residual, added, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_and_gate(ops: CpuOps, dtype: torch.dtype) -> None:
    x, norm = torch.randn(9, 72), torch.rand(72).to(dtype)
    torch.testing.assert_close(ops.rms_norm(x, norm, 1e-6), REFERENCE.rms_norm(x, norm, 1e-6), rtol=1e-5, atol=1e-6)
    gate_up = torch.randn(9, 2 * 40) * 30  # far into both tails of the exponential
    torch.testing.assert_close(ops.silu_mul(gate_up), REFERENCE.silu_mul(gate_up), rtol=1e-5, atol=1e-6)
    weight = torch.randn(80, 72).to(dtype)
    expected = REFERENCE.norm_gated_linear(x, norm, 1e-6, weight)
    torch.testing.assert_close(ops.norm_gated_linear(x, norm, 1e-6, weight), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(9, 3, 64), (4, 4, 64), (8, 2, 128), (2, 1, 24)])
@pytest.mark.parametrize("window", [None, 5])
def test_rope_cache_attention(
    ops: CpuOps, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int, window: int | None
) -> None:
    shape = HeadShape(heads, kv_heads, head_dim)
    batch, cache = make_batch([(0, 1), (33, 1), (0, 40), (17, 5)], shape, dtype=dtype, logn=heads == 4)
    tokens = batch.positions.shape[0]
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * head_dim)
    norms = (torch.rand(head_dim).to(dtype), torch.rand(head_dim).to(dtype)) if heads == 8 else (None, None)
    other = LayerCache(cache.k.clone(), cache.v.clone())
    q = ops.rope_and_cache(qkv, batch, cache, shape, *norms, 1e-6)
    expected_q = REFERENCE.rope_and_cache(qkv, batch, other, shape, *norms, 1e-6)
    torch.testing.assert_close(q, expected_q, rtol=1e-5, atol=1e-5)
    step = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]  # one rounding step of the cache
    torch.testing.assert_close(cache.k, other.k, rtol=step, atol=step)
    torch.testing.assert_close(cache.v, other.v, rtol=0, atol=0)
    out = ops.attention(q, batch, cache, shape, window)
    torch.testing.assert_close(out, REFERENCE.attention(q, batch, cache, shape, window), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_in_any_batch(ops: CpuOps, dtype: torch.dtype) -> None:
    x, weight = torch.randn(131, 200), torch.randn(50, 200).to(dtype)
    whole = ops.linear(x, weight)
    for size in (1, 3, 4, 7, 64, 65):
        assert torch.equal(torch.cat([ops.linear(part, weight) for part in x.split(size)]), whole)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert torch.equal(ops.linear(x, weight), whole)
    torch.set_num_threads(threads)

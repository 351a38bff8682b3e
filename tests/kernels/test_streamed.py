"""The products whose weights are on their way early, against the reference; on a GPU only, Gluon has no interpreter."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType

import pytest
import torch

if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0):
    pytest.skip("needs a GPU with compute capability 9.0", allow_module_level=True)

from fastqwen.kernels import AttentionParts, DenseWeight, HeadShape, LayerCache
from fastqwen.kernels.reference import ReferenceOps
from fastqwen.kernels.triton import streamed_narrow, streamed_scalar
from fastqwen.kernels.triton.attention import DecodeWorkspace
from fastqwen.kernels.triton.streamed import StreamTiling, streamed_linear
from fastqwen.kernels.triton.streamed_attention import DecodeTiling, decode_attention
from fastqwen.kernels.triton.workspace import Workspace
from tests.kernels.batches import copy_of, make_batch

DEVICE = torch.device("cuda")
TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 8e-3}


def random(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, device=DEVICE).to(dtype)


def close(found: torch.Tensor, expected: torch.Tensor, factor: float = 1.0) -> None:
    error = (found.double() - expected).norm() / expected.norm()
    assert error < factor * TOLERANCE[found.dtype], error


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tiling", [StreamTiling(64, 1, 3), StreamTiling(128, 3, 4), StreamTiling(64, 4, 8)])
@pytest.mark.parametrize("rows", [2, 7, 16, 33, 64])
@pytest.mark.parametrize(("n", "k"), [(64, 512), (448, 1024), (1024, 768)])
def test_products(dtype: torch.dtype, tiling: StreamTiling, rows: int, n: int, k: int):
    space = Workspace(DEVICE)
    x, weight = random(rows, k, dtype=dtype), (random(2 * n, k) * k**-0.5).to(dtype)
    bias, residual = random(2 * n, dtype=dtype), random(rows, n, dtype=dtype)
    wide = x.double() @ weight.double().t() + bias.double()
    for _ in range(2):  # the second time with the counters that the first one left
        half = weight[:n].contiguous()
        plain = streamed_linear(x, DenseWeight(half, bias[:n].contiguous()), space, tiling=tiling)
        close(plain, wide[:, :n])
        gated = streamed_linear(x, DenseWeight(weight, bias), space, gated=True, tiling=tiling)
        close(gated, torch.nn.functional.silu(wide[:, :n]) * wide[:, n:])
        total = residual.clone()
        streamed_linear(x, DenseWeight(half), space, add_to=total, tiling=tiling)
        close(total, residual.double() + x.double() @ weight[:n].double().t())
    assert not space.counter.any()


def test_a_row_that_is_not_finite_stays_alone():
    space = Workspace(DEVICE)
    x, weight = random(9, 512, dtype=torch.bfloat16), DenseWeight(random(128, 512, dtype=torch.bfloat16))
    expected = streamed_linear(x, weight, space)
    x[4] = float("nan")
    found = streamed_linear(x, weight, space)
    keep = [0, 1, 2, 3, 5, 6, 7, 8]
    assert torch.equal(found[keep], expected[keep])


def test_a_chain_sees_what_each_kernel_left():
    """Each kernel begins before the one in front has ended, in a graph as in a step."""
    space = Workspace(DEVICE)
    weights = [(random(512, 512) * 512**-0.5).to(torch.bfloat16) for _ in range(12)]
    first = random(8, 512, dtype=torch.bfloat16)

    def chain() -> torch.Tensor:
        x = first
        for weight in weights:
            x = streamed_linear(x, DenseWeight(weight), space, tiling=StreamTiling(128, 2, 3))
        return x

    expected = chain()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = chain()
    for _ in range(50):
        found.zero_()
        graph.replay()
        assert torch.equal(found, expected)
    reference = first.double()
    for weight in weights:
        reference = reference @ weight.double().t()
    assert (found.double() - reference).norm() / reference.norm() < 0.05


CONTEXTS = [(199, 1), (3, 1), (64, 1), (1000, 1), (0, 1), (127, 1), (129, 1)]
SHAPES = [HeadShape(4, 4, 64, 64), HeadShape(6, 2, 128, 128), HeadShape(16, 1, 128, 128), HeadShape(16, 8, 128, 128)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("window", [None, 33])
@pytest.mark.parametrize("tiling", [DecodeTiling(1, 128), DecodeTiling(3, 64), DecodeTiling(12, 128)])
@pytest.mark.parametrize("block_size", [16, 64])
def test_attention(dtype: torch.dtype, shape: HeadShape, window: int | None, tiling: DecodeTiling, block_size: int):
    logn, normed = shape.num_kv_heads == 4, shape.num_kv_heads != 4
    batch, cache = make_batch(CONTEXTS, shape, dtype=dtype, device="cuda", logn=logn, block_size=block_size)
    exact = LayerCache(cache.k.double(), cache.v.double())
    _spoil_unused(batch, cache)
    dim = shape.head_dim
    qkv = random(len(CONTEXTS), shape.width, dtype=dtype)
    norms = [(1 + 0.2 * random(dim)).to(dtype) if normed else None for _ in range(2)]
    parts = AttentionParts(shape, *norms, 1e-6, window)
    doubled = replace(
        parts,
        **{name: None if one is None else one.double() for name, one in zip(("q_norm", "k_norm"), norms, strict=True)},
    )
    expected = ReferenceOps().attend(qkv.double(), batch, exact, doubled)
    space = DecodeWorkspace(DEVICE, max_rows=16, shape=shape, max_parts=4096)
    for _ in range(2):
        out = torch.full((len(CONTEXTS), shape.num_heads * dim), float("nan"), dtype=dtype, device=DEVICE)
        decode_attention(qkv, batch, cache, parts, space, out=out, tiling=tiling)
        close(out, expected, factor=2.0)  # queries, keys and chances are rounded on the way
        assert not space.counter.any()
    used = _used(batch, cache, CONTEXTS, block_size)
    for found, wanted in ((cache.k, exact.k), (cache.v, exact.v)):
        close(found.transpose(1, 2)[used], wanted.transpose(1, 2)[used])


def test_only_the_counted_rows_are_computed():
    shape = HeadShape(6, 2, 128, 128)
    batch, cache = make_batch(CONTEXTS, shape, dtype=torch.bfloat16, device="cuda", block_size=64)
    qkv = random(len(CONTEXTS), 10 * 128, dtype=torch.bfloat16)
    space = DecodeWorkspace(DEVICE, max_rows=16, shape=shape, max_parts=4096)
    parts, tiling = AttentionParts(shape), DecodeTiling(4, 64)
    whole = torch.zeros(len(CONTEXTS), 6 * 128, dtype=torch.bfloat16, device=DEVICE)
    decode_attention(qkv, batch, cache, parts, space, out=whole, tiling=tiling)
    some = torch.zeros_like(whole)
    counted = replace(batch, decode_count=torch.tensor([3], dtype=torch.int32, device=DEVICE))
    decode_attention(qkv, counted, cache, parts, space, out=some, tiling=tiling)
    assert torch.equal(some[:3], whole[:3]) and not some[3:].any()


def _used(batch, cache: LayerCache, rows, block_size: int) -> torch.Tensor:
    """bool [blocks, block_size]: where the rows' tokens are, the new ones included"""
    used = torch.zeros(cache.k.shape[0], block_size, dtype=torch.bool, device=DEVICE)
    for index, (start, new) in enumerate(rows):
        places = torch.arange(start + new, device=DEVICE)
        table = batch.block_tables[batch.slots[index].item()]
        used[table[places // block_size].long(), places % block_size] = True
    return used


def _spoil_unused(batch, cache: LayerCache) -> None:
    """What lies beyond the contexts must not matter."""
    unused = ~_used(batch, cache, CONTEXTS, cache.k.shape[2])
    for part in (cache.k, cache.v):
        part.transpose(1, 2)[unused] = float("nan")


@pytest.mark.parametrize("cache_dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("kernels", "shape"),
    [(streamed_narrow, shape) for shape in SHAPES]
    + [(streamed_scalar, shape) for shape in (*SHAPES, HeadShape(8, 2, 64, 64)) if shape.group <= 4],
    ids=str,
)
@pytest.mark.parametrize("window", [None, 33])
@pytest.mark.parametrize("tiling", [DecodeTiling(1, 128), DecodeTiling(3, 64), DecodeTiling(12, 128)], ids=str)
@pytest.mark.parametrize("block_size", [16, 64])
def test_attention_over_8_bits(
    cache_dtype: torch.dtype,
    dtype: torch.dtype,
    kernels: ModuleType,
    shape: HeadShape,
    window: int | None,
    tiling: DecodeTiling,
    block_size: int,
):
    """The same queries, in the same type; what the new token leaves in the cache may be rounded to the other side."""
    logn, normed = shape.num_kv_heads == 4, shape.num_kv_heads != 4
    batch, cache = make_batch(CONTEXTS, shape, dtype=cache_dtype, device="cuda", logn=logn, block_size=block_size)
    unused = ~_used(batch, cache, CONTEXTS, block_size)
    for scales in (cache.k_scale, cache.v_scale):
        scales.transpose(1, 2)[unused] = float("nan")
    exact, dim = copy_of(cache), shape.head_dim
    qkv = random(len(CONTEXTS), shape.width, dtype=dtype)
    norms = [(1 + 0.2 * random(dim)).to(dtype) if normed else None for _ in range(2)]
    parts = AttentionParts(shape, *norms, 1e-6, window)
    expected = ReferenceOps().attend(qkv, batch, exact, parts)
    space = DecodeWorkspace(DEVICE, max_rows=16, shape=shape, max_parts=4096)
    for _ in range(2):
        out = torch.full((len(CONTEXTS), shape.num_heads * dim), float("nan"), dtype=dtype, device=DEVICE)
        kernels.decode_attention(qkv, batch, cache, parts, space, out=out, tiling=tiling)
        close(out, expected.double(), factor=8.0 if cache_dtype == torch.float8_e4m3fn else 4.0)
        assert not space.counter.any()
    used = ~unused
    for found, wanted in ((cache.k_scale, exact.k_scale), (cache.v_scale, exact.v_scale)):
        torch.testing.assert_close(
            found.transpose(1, 2)[used], wanted.transpose(1, 2)[used], rtol=2e-3 + torch.finfo(dtype).eps / 2, atol=0
        )

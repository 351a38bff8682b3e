"""The Triton kernels against the reference, through Triton's interpreter where there is no GPU.

The interpreter computes tl.dot rightly in float16 and float32 only; bfloat16 is tested where a GPU is.
"""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

from fastqwen.kernels import HeadShape, LayerCache  # noqa: E402
from fastqwen.kernels.reference import ReferenceOps  # noqa: E402
from fastqwen.kernels.triton import attention, experts, linear  # noqa: E402
from fastqwen.kernels.triton.ops import TritonOps  # noqa: E402
from fastqwen.kernels.triton.workspace import Workspace  # noqa: E402
from tests.kernels.batches import make_batch  # noqa: E402

REFERENCE = ReferenceOps()
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
TOLERANCE = {torch.float32: 2e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}


@pytest.fixture(scope="module")
def ops() -> TritonOps:
    return TritonOps(torch.device(DEVICE))


def random(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(shape) * scale).to(dtype).to(DEVICE)


def close(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found.float(), expected.float(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "k", "n"),
    [(1, 256, 96), (1, 200, 33), (3, 128, 80), (17, 192, 64), (64, 320, 48)],
)
def test_linears(ops: TritonOps, dtype: torch.dtype, rows: int, k: int, n: int):
    x, weight, bias = random(rows, k, dtype=dtype), random(n, k, dtype=dtype, scale=k**-0.5), random(n, dtype=dtype)
    norm = random(k, dtype=dtype)
    close(ops.linear(x, weight, bias), REFERENCE.linear(x, weight, bias), dtype)
    close(ops.norm_linear(x, norm, 1e-6, weight, bias), REFERENCE.norm_linear(x, norm, 1e-6, weight, bias), dtype)
    residual = random(rows, n, dtype=dtype)
    expected = residual.clone()
    ops.linear_add(residual, x, weight, bias)
    REFERENCE.linear_add(expected, x, weight, bias)
    close(residual, expected, dtype)
    for wide_bias in (None, random(2 * n, dtype=dtype)):
        wide = random(2 * n, k, dtype=dtype, scale=k**-0.5)
        expected = REFERENCE.norm_gated_linear(x, norm, 1e-6, wide, wide_bias)
        close(ops.norm_gated_linear(x, norm, 1e-6, wide, wide_bias), expected, dtype)


@pytest.mark.parametrize("split_k", [1, 2, 4])
def test_split_products_leave_their_counters_at_zero(split_k: int):
    space = Workspace(torch.device(DEVICE))
    x, weight = random(5, 512, dtype=torch.float16), random(70, 512, dtype=torch.float16, scale=0.05)
    tiling = linear.Tiling(16, 4, 64, split_k, 2)
    for _ in range(2):
        found = linear.skinny_linear(x, weight, space, tiling=tiling)
        close(found, REFERENCE.linear(x, weight), torch.float16)
        assert not space.counter.any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows(ops: TritonOps, dtype: torch.dtype):
    x, norm = random(70, 136, dtype=dtype), random(136, dtype=dtype)
    close(ops.rms_norm(x, norm, 1e-6), REFERENCE.rms_norm(x, norm, 1e-6), dtype)
    close(ops.silu_mul(x * 8), REFERENCE.silu_mul(x * 8), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "normalize"), [(1, True), (1, False), (9, True), (40, False), (259, True)])
def test_experts(ops: TritonOps, dtype: torch.dtype, tokens: int, normalize: bool):
    """One token, a few, and so many that an expert has more than one tile."""
    hidden, size, count = 64, 48, 6
    norm, router = random(hidden, dtype=dtype), random(count, hidden, dtype=dtype, scale=hidden**-0.5)
    gate_up = random(count, 2 * size, hidden, dtype=dtype, scale=hidden**-0.5)
    down = random(count, hidden, size, dtype=dtype, scale=size**-0.5)
    for _ in range(2):  # the second time with what the first one left behind
        residual = random(4 * tokens, hidden, dtype=dtype)
        # Rounding may choose another expert where the third and the fourth are alike.
        likeliest = (REFERENCE.rms_norm(residual, norm, 1e-6) @ router.t()).float().topk(4).values
        residual = residual[likeliest[:, 2] - likeliest[:, 3] > 0.05][:tokens].contiguous()
        assert len(residual) == tokens
        expected = residual.clone()
        ops.add_experts(residual, norm, 1e-6, router, gate_up, down, top_k=3, normalize=normalize)
        REFERENCE.add_experts(expected, norm, 1e-6, router, gate_up, down, top_k=3, normalize=normalize)
        close(residual, expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_experts_last_tile_may_have_half_the_height(dtype: torch.dtype):
    """Of 128 pairs and more: one whole tile, one and a half, and less than half of one."""
    hidden, size, loads = 64, 32, (128, 190, 17)
    gate_up = random(3, 2 * size, hidden, dtype=dtype, scale=hidden**-0.5)
    down = random(3, hidden, size, dtype=dtype, scale=size**-0.5)
    chosen = torch.cat([torch.full((load,), expert) for expert, load in enumerate(loads)])
    chosen = chosen[torch.randperm(len(chosen))].to(DEVICE)
    logits = torch.nn.functional.one_hot(chosen, 3).to(dtype) * 4
    x, residual = random(len(chosen), hidden, dtype=dtype), random(len(chosen), hidden, dtype=dtype)
    wide = torch.einsum("th,tgh->tg", x.float(), gate_up[chosen].float())
    inner = torch.nn.functional.silu(wide[:, :size]) * wide[:, size:]
    expected = residual.float() + torch.einsum("ts,ths->th", inner, down[chosen].float())
    counts = torch.zeros(3, dtype=torch.int32, device=DEVICE)
    tiling = experts.GroupTiling(128, 64, 32, 32, 4, 2)
    experts.add_experts(residual, x, logits, gate_up, down, counts, top_k=1, normalize=True, tiling=tiling)
    close(residual, expected.to(dtype), dtype)


@pytest.mark.parametrize("tokens", [1, 3])
def test_a_row_that_is_not_finite_stays_alone(ops: TritonOps, tokens: int):
    """Such a row has no likeliest expert; it must not write outside of its own place."""
    norm, router = random(32, dtype=torch.float16), random(6, 32, dtype=torch.float16)
    gate_up = random(6, 32, 32, dtype=torch.float16, scale=0.1)
    down = random(6, 32, 16, dtype=torch.float16, scale=0.1)
    residual = random(tokens, 32, dtype=torch.float16)
    expected = residual.clone()
    ops.add_experts(expected, norm, 1e-6, router, gate_up, down, top_k=3, normalize=True)
    residual[0] = float("nan")
    ops.add_experts(residual, norm, 1e-6, router, gate_up, down, top_k=3, normalize=True)
    assert not torch.isfinite(residual[0]).any()
    assert torch.equal(residual[1:], expected[1:])


SHAPES = [HeadShape(4, 4, 64), HeadShape(6, 2, 64), HeadShape(8, 1, 128), HeadShape(7, 1, 32)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("window", [None, 9])
def test_mixed_batches(ops: TritonOps, dtype: torch.dtype, shape: HeadShape, window: int | None):
    """Decode rows, a fresh prompt, a chunk behind a cached part, a chunk that ends in the middle of a block."""
    rows = [(0, 1), (15, 1), (70, 1), (0, 40), (33, 17), (16, 2)]
    batch, cache = make_batch(rows, shape, dtype=dtype, device=DEVICE, logn=shape.num_heads == 4)
    other = LayerCache(cache.k.clone(), cache.v.clone())
    tokens = batch.positions.shape[0]
    qkv = random(tokens, (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim, dtype=dtype)
    normed = shape.num_heads == 8
    norms = {name: random(shape.head_dim, dtype=dtype) if normed else None for name in ("q_norm", "k_norm")}
    found = ops.attend(qkv, batch, cache, shape, **norms, eps=1e-6, window=window)
    expected = REFERENCE.attend(qkv, batch, other, shape, **norms, eps=1e-6, window=window)
    close(found, expected, dtype)
    close(cache.k, other.k, dtype)
    close(cache.v, other.v, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "tokens"),
    [([(30, 1), (9, 20), (0, 64), (0, 70), (0, 70)], 225), ([(0, 70), (0, 96), (0, 96)], 262), ([(0, 64)] * 2, 128)],
)
def test_fresh_prompts_through_the_library(
    ops: TritonOps, dtype: torch.dtype, shape: HeadShape, rows, tokens, monkeypatch
):
    """Beside rows that go on; of even and uneven lengths; and alone, where the library's result needs no copy."""
    monkeypatch.setattr("fastqwen.runner.step_layout.MIN_LIBRARY_TOKENS", 64)
    monkeypatch.setattr("fastqwen.kernels.triton.ops.LIBRARY_STEP", 32)
    batch, cache = make_batch(rows, shape, dtype=dtype, device=DEVICE, logn=shape.num_heads == 4, library=True)
    assert [count for _, count in batch.prompts.fresh] == [count for start, count in rows if start == 0]
    other = LayerCache(cache.k.clone(), cache.v.clone())
    qkv = random(tokens, (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim, dtype=dtype)
    nothing = {"q_norm": None, "k_norm": None, "eps": 1e-6, "window": None}
    found = ops.attend(qkv, batch, cache, shape, **nothing)
    close(found, REFERENCE.attend(qkv, batch, other, shape, **nothing), dtype)
    close(cache.k, other.k, dtype)
    close(cache.v, other.v, dtype)


@pytest.mark.parametrize("decode", [0, 1, 3])
def test_a_recorded_step_with_room_to_spare(ops: TritonOps, decode: int):
    """Fewer decode rows, tiles and tokens than the graph has room for: the rest changes nothing."""
    shape = HeadShape(6, 2, 64)
    rows = [(40, 1)] * decode + [(33, 17), (0, 30)]
    plain, cache = make_batch(rows, shape, dtype=torch.float16, device=DEVICE)
    other = LayerCache(cache.k.clone(), cache.v.clone())
    unused = set(range(cache.k.shape[0])) - set(plain.block_tables.flatten().tolist())
    spare_block = unused.pop()  # what pads a step has a block of its own
    tokens, room = plain.positions.shape[0], 64
    spare_line = plain.block_tables.shape[0]

    def padded(values: torch.Tensor, fill: int) -> torch.Tensor:
        more = torch.full((room - tokens, *values.shape[1:]), fill, dtype=values.dtype, device=DEVICE)
        return torch.cat([values, more])

    tables = torch.cat([plain.block_tables, torch.full_like(plain.block_tables[:1], spare_block)])
    tiles = torch.cat([plain.prompts.tiles, torch.zeros(3, 4, dtype=torch.int32, device=DEVICE)])
    recorded = replace(
        plain,
        positions=padded(plain.positions, 0),
        cos_sin=padded(plain.cos_sin, 0),
        token_tables=padded(plain.token_tables, spare_line),
        block_tables=tables,
        num_decode_rows=8,
        decode_count=torch.tensor([decode], dtype=torch.int32, device=DEVICE),
        prompts=replace(plain.prompts, tiles=tiles),
    )
    qkv = random(room, 10 * 64, dtype=torch.float16)
    nothing = {"q_norm": None, "k_norm": None, "eps": 1e-6, "window": None}
    found = ops.attend(qkv, recorded, cache, shape, **nothing)
    close(found[:tokens], REFERENCE.attend(qkv[:tokens], plain, other, shape, **nothing), torch.float16)
    others = torch.arange(cache.k.shape[0], device=DEVICE) != spare_block
    close(cache.k[others], other.k[others], torch.float16)
    close(cache.v[others], other.v[others], torch.float16)


@pytest.mark.parametrize("hold", [True, False])
@pytest.mark.parametrize("splits", [1, 2, 3, 64])
def test_parts_of_a_context_add_up(splits: int, hold: bool):
    shape = HeadShape(6, 2, 64)
    batch, cache = make_batch([(199, 1), (3, 1), (64, 1), (100, 1), (0, 1)], shape, dtype=torch.float16, device=DEVICE)
    cache.v[~_used(batch, cache)] = float("nan")  # what lies beyond the contexts must not matter
    other = LayerCache(cache.k.clone(), cache.v.clone())
    qkv = random(5, 10 * 64, dtype=torch.float16)
    space = attention.DecodeWorkspace(torch.device(DEVICE), max_rows=8, shape=shape, max_parts=8 * 64)
    nothing = {"q_norm": None, "k_norm": None, "eps": 1e-6, "window": None}
    expected = REFERENCE.attend(qkv, batch, other, shape, **nothing)
    for _ in range(2):
        out = torch.full((5, 6 * 64), float("nan"), dtype=torch.float16, device=DEVICE)
        attention.decode_attention(qkv, batch, cache, shape, space, **nothing, out=out, splits=splits, hold=hold)
        close(out, expected, torch.float16)
        assert not space.counter.any()


def _used(batch, cache) -> torch.Tensor:
    """bool [blocks, kv_heads, block_size, head_dim]: positions that belong to a context."""
    used = torch.zeros_like(cache.v, dtype=torch.bool)
    size = cache.v.shape[2]
    for row, context in enumerate(batch.rows.context_lens.tolist()):
        table = batch.block_tables[batch.rows.tables[row]]
        for position in range(context):
            used[table[position // size], :, position % size] = True
    return used

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

import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from fastqwen.kernels import AttentionParts, DenseWeight, ExpertsWeight, HeadShape, LayerCache, Norm  # noqa: E402
from fastqwen.kernels.reference import ReferenceOps  # noqa: E402
from fastqwen.kernels.triton import attention, experts, linear, prefill  # noqa: E402
from fastqwen.kernels.triton.cache_numbers import bits_of, raised  # noqa: E402
from fastqwen.kernels.triton.ops import TritonOps  # noqa: E402
from fastqwen.kernels.triton.workspace import Workspace  # noqa: E402
from tests.kernels.batches import copy_of, make_batch  # noqa: E402

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
    [(1, 256, 96), (1, 200, 33), (3, 128, 80), (17, 192, 64), (64, 320, 48), (1, 64, 1), (5, 64, 1)],
)
def test_linears(ops: TritonOps, dtype: torch.dtype, rows: int, k: int, n: int):
    x, norm = random(rows, k, dtype=dtype), Norm(random(k, dtype=dtype), 1e-6)
    weight = DenseWeight(random(n, k, dtype=dtype, scale=k**-0.5), random(n, dtype=dtype))
    close(ops.linear(x, weight), REFERENCE.linear(x, weight), dtype)
    close(ops.norm_linear(x, norm, weight), REFERENCE.norm_linear(x, norm, weight), dtype)
    residual = random(rows, n, dtype=dtype)
    expected = residual.clone()
    ops.linear_add(residual, x, weight)
    REFERENCE.linear_add(expected, x, weight)
    close(residual, expected, dtype)
    for wide_bias in (None, random(2 * n, dtype=dtype)):
        wide = DenseWeight(random(2 * n, k, dtype=dtype, scale=k**-0.5), wide_bias)
        close(ops.norm_gated_linear(x, norm, wide), REFERENCE.norm_gated_linear(x, norm, wide), dtype)


@pytest.mark.parametrize("split_k", [1, 2, 4])
def test_split_products_leave_their_counters_at_zero(split_k: int):
    space = Workspace(torch.device(DEVICE))
    x, weight = random(5, 512, dtype=torch.float16), DenseWeight(random(70, 512, dtype=torch.float16, scale=0.05))
    tiling = linear.Tiling(16, 4, 64, split_k, 2)
    for _ in range(2):
        found = linear.skinny_linear(x, weight, space, tiling=tiling)
        close(found, REFERENCE.linear(x, weight), torch.float16)
        assert not space.counter.any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows(ops: TritonOps, dtype: torch.dtype):
    x, norm = random(70, 136, dtype=dtype), Norm(random(136, dtype=dtype), 1e-6)
    close(ops.rms_norm(x, norm), REFERENCE.rms_norm(x, norm), dtype)
    close(ops.silu_mul(x * 8), REFERENCE.silu_mul(x * 8), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "normalize"), [(1, True), (1, False), (9, True), (40, False), (259, True)])
def test_experts(ops: TritonOps, dtype: torch.dtype, tokens: int, normalize: bool):
    """One token, a few, and so many that an expert has more than one tile."""
    hidden, size, count = 64, 48, 6
    norm, router = Norm(random(hidden, dtype=dtype), 1e-6), random(count, hidden, dtype=dtype, scale=hidden**-0.5)
    gate_up = random(count, 2 * size, hidden, dtype=dtype, scale=hidden**-0.5)
    down = random(count, hidden, size, dtype=dtype, scale=size**-0.5)
    weight = ExpertsWeight(router, gate_up, down, top_k=3, normalize=normalize)
    for is_first in (True, False):  # the second time with what the first one left behind, and beside the residual
        residual = random(4 * tokens, hidden, dtype=dtype)
        # Rounding may choose another expert where the third and the fourth are alike.
        likeliest = (REFERENCE.rms_norm(residual, norm) @ router.t()).float().topk(4).values
        residual = residual[likeliest[:, 2] - likeliest[:, 3] > 0.05][:tokens].contiguous()
        assert len(residual) == tokens
        expected, found = residual.clone(), residual if is_first else torch.zeros_like(residual)
        REFERENCE.add_experts(expected, residual, norm, weight)
        ops.add_experts(found, residual, norm, weight)
        close(found if is_first else residual + found, expected, dtype)


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
    weight = ExpertsWeight(logits, gate_up, down, top_k=1, normalize=True)
    experts.add_experts(residual, x, logits, weight, counts, tiling=tiling)
    close(residual, expected.to(dtype), dtype)


@pytest.mark.parametrize("tokens", [1, 3])
def test_a_row_that_is_not_finite_stays_alone(ops: TritonOps, tokens: int):
    """Such a row has no likeliest expert; it must not write outside of its own place."""
    norm, router = Norm(random(32, dtype=torch.float16), 1e-6), random(6, 32, dtype=torch.float16)
    gate_up = random(6, 32, 32, dtype=torch.float16, scale=0.1)
    down = random(6, 32, 16, dtype=torch.float16, scale=0.1)
    weight = ExpertsWeight(router, gate_up, down, top_k=3, normalize=True)
    residual = random(tokens, 32, dtype=torch.float16)
    expected = residual.clone()
    ops.add_experts(expected, expected, norm, weight)
    residual[0] = float("nan")
    ops.add_experts(residual, residual, norm, weight)
    assert not torch.isfinite(residual[0]).any()
    assert torch.equal(residual[1:], expected[1:])


SHAPES = [
    HeadShape(4, 4, 64, 64), HeadShape(6, 2, 64, 64), HeadShape(8, 1, 128, 128), HeadShape(7, 1, 32, 32),
    HeadShape(8, 2, 128, 32),
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("window", [None, 9])
def test_mixed_batches(ops: TritonOps, dtype: torch.dtype, shape: HeadShape, window: int | None):
    """Decode rows, a fresh prompt, a chunk behind a cached part, a chunk that ends in the middle of a block."""
    rows = [(0, 1), (15, 1), (70, 1), (0, 40), (33, 17), (16, 2)]
    step, cache = make_batch(rows, shape, dtype=dtype, device=DEVICE, logn=shape.num_heads == 4)
    check_attention(ops, step, cache, shape, dtype, window)


@pytest.mark.parametrize(
    ("dtype", "cache_dtype"), [(torch.float32, None), (torch.float16, None), (torch.float16, torch.int8)]
)
@pytest.mark.parametrize("window", [None, 150])
def test_few_new_tokens_behind_a_long_context(
    ops: TritonOps,
    dtype: torch.dtype,
    cache_dtype: torch.dtype | None,
    window: int | None,
    monkeypatch: pytest.MonkeyPatch,
):
    """The context is cut into parts, for one row; for the others it is too short for that."""
    monkeypatch.setattr(prefill, "LEAST_KEYS", 64)
    shape = HeadShape(2, 1, 64, 64)
    step, cache = make_batch([(10, 1), (400, 5), (0, 30)], shape, dtype=cache_dtype or dtype, device=DEVICE)
    for _ in range(2):  # the second time with the counters that the first one left
        check_attention(ops, step, cache, shape, dtype, window)


# The interpreter cuts numbers off where a GPU rounds them, but for float16.
@pytest.mark.parametrize("cache_dtype", DTYPES[1:])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_cache_of_another_type_than_the_arithmetics(ops: TritonOps, dtype: torch.dtype, cache_dtype: torch.dtype):
    """Keys and values are raised after loading: the error is the rounding of what is stored."""
    shape = HeadShape(6, 2, 64, 64)
    step, cache = make_batch([(15, 1), (70, 1), (0, 40), (33, 17)], shape, dtype=cache_dtype, device=DEVICE)
    check_attention(ops, step, cache, shape, dtype, None)


EIGHT_BITS = [torch.int8, torch.float8_e4m3fn]


@pytest.mark.parametrize(("cache_dtype", "dtype", "window"), [
    (torch.int8, torch.float16, None), (torch.float8_e4m3fn, torch.float16, 9), (torch.int8, torch.float32, 9),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_cache_of_8_bits(
    ops: TritonOps, dtype: torch.dtype, cache_dtype: torch.dtype, shape: HeadShape, window: int | None
):
    """Keys and values are raised after loading, exactly: the error is the rounding of what is stored."""
    rows = [(0, 1), (15, 1), (70, 1), (0, 40), (33, 17), (16, 2)]
    step, cache = make_batch(rows, shape, dtype=cache_dtype, device=DEVICE, logn=shape.num_heads == 4)
    spoil_unused_scales(step, cache)
    check_attention(ops, step, cache, shape, dtype, window)


def spoil_unused_scales(step, cache: LayerCache) -> None:
    """What lies beyond the contexts must not matter."""
    unused = ~_used(step, cache)[..., 0]
    cache.k_scale[unused] = cache.v_scale[unused] = float("nan")


@pytest.mark.parametrize("cache_dtype", EIGHT_BITS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_number_of_8_bits_is_raised_exactly(cache_dtype: torch.dtype, dtype: torch.dtype):
    numbers = torch.arange(256, dtype=torch.uint8).view(cache_dtype)
    numbers = numbers[torch.isfinite(numbers.float())].contiguous().to(DEVICE)
    found = torch.empty(256, dtype=dtype, device=DEVICE)
    _raise_all[(1,)](bits_of(numbers), found, len(numbers))
    assert (found[: len(numbers)].double() * 256).equal(numbers.double())


@triton.jit
def _raise_all(stored_ptr, out_ptr, count):
    at = tl.arange(0, 256)
    tl.store(out_ptr + at, raised(tl.load(stored_ptr + at, mask=at < count, other=0), out_ptr.dtype.element_ty))


@pytest.mark.parametrize("cache_dtype", EIGHT_BITS, ids=str)
def test_what_is_stored_has_8_bits_and_a_scale(ops: TritonOps, cache_dtype: torch.dtype):
    """Very large and very small heads, zeros, and ties: the reference's numbers, but for a bit where float32 rounds."""
    shape = HeadShape(1, 1, 64, 64)
    step, cache = make_batch([(0, 8)], shape, dtype=cache_dtype, device=DEVICE)
    other, qkv = copy_of(cache), random(8, shape.width, dtype=torch.float32)
    qkv *= torch.tensor([1, 1e-9, 1e4, 0, 1e-3, 3, 7, 300.0], device=DEVICE)[:, None]
    ops.attend(qkv, step, cache, AttentionParts(shape))
    REFERENCE.attend(qkv, step, other, AttentionParts(shape))
    used = _used(step, cache)
    for found, scale, expected, expected_scale in (
        (cache.k, cache.k_scale, other.k, other.k_scale), (cache.v, cache.v_scale, other.v, other.v_scale)
    ):  # fmt: skip
        torch.testing.assert_close(scale[used[..., 0]], expected_scale[used[..., 0]], rtol=1e-3, atol=0)
        codes, expected_codes = (
            torch.where(one.float() == 0, 0, one.view(torch.uint8).int()) for one in (found[used], expected[used])
        )
        assert (codes != expected_codes).float().mean() < 0.02 and ((codes - expected_codes).abs() % 255 <= 1).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 3e38])
@pytest.mark.parametrize("cache_dtype", EIGHT_BITS, ids=str)
def test_what_is_not_finite_is_not_hidden_in_8_bits(ops: TritonOps, cache_dtype: torch.dtype, bad: float):
    """One number of one key; all later tokens see it, and no row beside it does."""
    shape = HeadShape(1, 1, 64, 64)
    step, cache = make_batch([(0, 1), (0, 9), (0, 9)], shape, dtype=cache_dtype, device=DEVICE)
    qkv = random(19, shape.width, dtype=torch.float32)
    qkv[14, 64 + 5] = bad
    found = ops.attend(qkv, step, cache, AttentionParts(shape))
    broken = ~torch.isfinite(found).all(1)
    assert broken.tolist() == [token >= 14 for token in range(19)]


def check_attention(ops: TritonOps, step, cache: LayerCache, shape: HeadShape, dtype: torch.dtype, window: int | None):
    """More columns may stand behind the values."""
    other = copy_of(cache)
    qkv = random(step.positions.shape[0], shape.width + 16, dtype=dtype)
    norms = [random(shape.head_dim, dtype=dtype) if shape.num_heads == 8 else None for _ in range(2)]
    parts = AttentionParts(shape, *norms, 1e-6, window)
    found = ops.attend(qkv, step, cache, parts)
    expected = REFERENCE.attend(qkv, step, other, parts)
    if cache.k.element_size() == 1:  # a number on the edge may be rounded to the other side
        assert (found.float() - expected.float()).norm() / expected.float().norm() < (
            2e-2 if dtype.itemsize < 4 else 5e-3
        )
        return
    close(found, expected, dtype)
    close(cache.k, other.k, cache.k.dtype)
    close(cache.v, other.v, cache.k.dtype)


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
    step, cache = make_batch(rows, shape, dtype=dtype, device=DEVICE, logn=shape.num_heads == 4, library=True)
    assert [count for _, count in step.prompts.fresh] == [count for start, count in rows if start == 0]
    other = LayerCache(cache.k.clone(), cache.v.clone())
    qkv, parts = random(tokens, shape.width, dtype=dtype), AttentionParts(shape)
    found = ops.attend(qkv, step, cache, parts)
    close(found, REFERENCE.attend(qkv, step, other, parts), dtype)
    close(cache.k, other.k, dtype)
    close(cache.v, other.v, dtype)


@pytest.mark.parametrize("decode", [0, 1, 3])
def test_a_recorded_step_with_room_to_spare(ops: TritonOps, decode: int):
    """Fewer decode rows, tiles and tokens than the graph has room for: the rest changes nothing."""
    shape = HeadShape(6, 2, 64, 64)
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
        slots=padded(plain.slots, spare_line),
        block_tables=tables,
        num_decode_rows=8,
        decode_count=torch.tensor([decode], dtype=torch.int32, device=DEVICE),
        prompts=replace(plain.prompts, tiles=tiles),
    )
    qkv, parts = random(room, 10 * 64, dtype=torch.float16), AttentionParts(shape)
    found = ops.attend(qkv, recorded, cache, parts)
    close(found[:tokens], REFERENCE.attend(qkv[:tokens], plain, other, parts), torch.float16)
    others = torch.arange(cache.k.shape[0], device=DEVICE) != spare_block
    close(cache.k[others], other.k[others], torch.float16)
    close(cache.v[others], other.v[others], torch.float16)


@pytest.mark.parametrize("hold", [True, False])
@pytest.mark.parametrize("splits", [1, 2, 3, 64])
def test_parts_of_a_context_add_up(splits: int, hold: bool):
    shape = HeadShape(6, 2, 64, 64)
    step, cache = make_batch([(199, 1), (3, 1), (64, 1), (100, 1), (0, 1)], shape, dtype=torch.float16, device=DEVICE)
    cache.v[~_used(step, cache)] = float("nan")  # what lies beyond the contexts must not matter
    other = LayerCache(cache.k.clone(), cache.v.clone())
    qkv, parts = random(5, 10 * 64, dtype=torch.float16), AttentionParts(shape)
    space = attention.DecodeWorkspace(torch.device(DEVICE), max_rows=8, shape=shape, max_parts=8 * 64)
    expected = REFERENCE.attend(qkv, step, other, parts)
    for _ in range(2):
        out = torch.full((5, 6 * 64), float("nan"), dtype=torch.float16, device=DEVICE)
        attention.decode_attention(qkv, step, cache, parts, space, out=out, splits=splits, hold=hold)
        close(out, expected, torch.float16)
        assert not space.counter.any()


def _used(step, cache) -> torch.Tensor:
    """bool [blocks, kv_heads, block_size, head_dim]: positions that belong to a context."""
    used = torch.zeros_like(cache.v, dtype=torch.bool)
    size = cache.v.shape[2]
    for slot, last in zip(step.slots.tolist(), step.positions.tolist(), strict=True):
        for position in range(last + 1):
            used[step.block_tables[slot, position // size], :, position % size] = True
    return used

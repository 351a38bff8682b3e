"""Random paged batches for tests of ops: rows of several lengths, blocks in a shuffled order."""

from __future__ import annotations

import torch

from fastqwen.kernels import HeadShape, LayerCache, PromptTiles, StepTokens
from fastqwen.layers.rotary import inverse_frequencies
from fastqwen.model_config import ModelConfig
from fastqwen.runner.step_layout import cut_tiles


def make_batch(
    rows: list[tuple[int, int]],
    shape: HeadShape,
    *,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    logn: bool = False,
    library: bool = False,
) -> tuple[StepTokens, LayerCache]:
    """``rows`` are (tokens in the cache before, new tokens). The cache is full of random keys and values, of type ``dtype``, and
    has scales if that has 8 bits."""
    contexts = [start + new for start, new in rows]
    width = max(-(-context // block_size) for context in contexts) + 1
    num_blocks = sum(-(-context // block_size) for context in contexts) + 2
    order = torch.randperm(num_blocks).tolist()
    line = torch.randperm(len(rows) + 2).tolist()[: len(rows)]  # the block tables are not in the rows' order
    tables = torch.full((len(rows) + 2, width), 1 << 30, dtype=torch.int32)  # of no block: whoever reads there, crashes
    positions, slots, starts = [], [], [0]
    for row, (start, new) in enumerate(rows):
        count = -(-contexts[row] // block_size)
        blocks = [order.pop() for _ in range(count)]
        tables[line[row], :count] = torch.tensor(blocks, dtype=torch.int32)
        for position in range(start, start + new):
            positions.append(position)
            slots.append(line[row])
        starts.append(len(positions))
    angles = torch.tensor(positions)[:, None] / (100.0 ** (torch.arange(shape.rotary_dim // 2) / shape.rotary_dim * 2))
    size = (num_blocks, shape.num_kv_heads, block_size, shape.head_dim)
    cache = random_cache(size, dtype, device)
    decode = next((index for index, (_, new) in enumerate(rows) if new > 1), len(rows))
    tiles, fresh = cut_tiles(
        [(line[row], *rows[row]) for row in range(decode, len(rows))], decode, height=16, library=library
    )
    step = StepTokens(
        positions=torch.tensor(positions, dtype=torch.int32, device=device),
        slots=torch.tensor(slots, dtype=torch.int32, device=device),
        row_starts=torch.tensor(starts, dtype=torch.int32, device=device),
        cos_sin=torch.cat([angles.cos(), angles.sin()], dim=-1).float().to(device),
        q_scale=(1 + torch.rand(len(positions))).to(device) if logn else None,
        block_tables=tables.to(device),
        num_decode_rows=decode,
        prompts=PromptTiles(torch.from_numpy(tiles).to(device), 16, fresh) if decode < len(rows) else None,
    )
    return step, cache


def random_cache(size: tuple[int, int, int, int], dtype: torch.dtype, device: str) -> LayerCache:
    if dtype.itemsize > 1:
        return LayerCache(*(torch.randn(size).to(dtype).to(device) for _ in range(2)))
    numbers = [(torch.randn(size) * 30).clamp(-127, 127).to(dtype).to(device) for _ in range(2)]
    scales = [(torch.rand(size[:3]) / 30 + 0.01).half().to(device) for _ in range(2)]
    return LayerCache(*numbers, *scales)


def copy_of(cache: LayerCache) -> LayerCache:
    return LayerCache(
        *(None if one is None else one.clone() for one in (cache.k, cache.v, cache.k_scale, cache.v_scale))
    )


def one_prompt(config: ModelConfig, count: int) -> StepTokens:
    """A whole prompt of ``count`` tokens, alone, all in the first block."""
    positions = torch.arange(count, dtype=torch.int32)
    angles = positions[:, None] * inverse_frequencies(config.rope, config.rotary_dim)[0]
    return StepTokens(
        positions=positions,
        slots=torch.zeros(count, dtype=torch.int32),
        row_starts=torch.tensor([0, count], dtype=torch.int32),
        cos_sin=torch.cat([angles.cos(), angles.sin()], dim=-1),
        q_scale=None,
        block_tables=torch.zeros(1, 1, dtype=torch.int32),
        num_decode_rows=0,
        held=torch.zeros(1, dtype=torch.int32),
    )

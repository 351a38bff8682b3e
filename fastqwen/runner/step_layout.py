"""A GPU step as one array of whole numbers: filled on the host, copied once, read by every kernel.

A recorded step has a layout of its own whose sizes are upper bounds; what a step does not need of it is padded with
tokens and rows of the spare slot, whose results nobody reads, and with empty tiles.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fastqwen.records import Row

TILE_TOKENS = 64
MIN_LIBRARY_TOKENS = 1024  # shorter fresh prompts are cheaper as tiles of one launch than as launches of their own

Ints = NDArray[np.int32]


@dataclass(frozen=True)
class StepInputs:
    """Views of the array on the device."""

    token_slots: Tensor  # int32 [tokens]
    positions: Tensor  # int32 [tokens]
    tiles: Tensor  # int32 [tiles, 4], as PromptTiles has them
    decode_count: Tensor  # int32 [1]
    sample_tokens: Tensor  # int32 [samples]: the token whose hidden state gives the row's logits
    sample_slots: Tensor  # int32 [samples]
    sample_positions: Tensor  # int32 [samples]: of the token that is to be sampled


@dataclass(frozen=True)
class StepLayout:
    tokens: int
    tiles: int
    samples: int

    @property
    def size(self) -> int:
        return 2 * self.tokens + 4 * self.tiles + 1 + 3 * self.samples

    def _cuts(self) -> list[int]:
        sizes = (self.tokens, self.tokens, 4 * self.tiles, 1, self.samples, self.samples, self.samples)
        return list(itertools.accumulate(sizes))

    def views(self, array: Tensor) -> StepInputs:
        """``array`` int32 [at least size], on the device."""
        slots, positions, tiles, count, *samples = array[: self.size].tensor_split(self._cuts()[:-1])
        return StepInputs(slots, positions, tiles.view(self.tiles, 4), count, *samples)

    def fill(self, out: Ints, rows: Sequence[Row], tiles: Ints, num_decode_rows: int, spare: int) -> None:
        """Write a step into ``out`` int32 [at least size]. The step's own sizes may be smaller than the layout's."""
        slots = np.fromiter((row.slot for row in rows), np.int32, len(rows))
        starts = np.fromiter((row.start for row in rows), np.int32, len(rows))
        counts = np.fromiter((row.num_tokens for row in rows), np.int32, len(rows))
        ends = np.cumsum(counts, dtype=np.int32)
        num_tokens = int(ends[-1])
        samples = np.fromiter((row.samples for row in rows), np.bool_, len(rows))
        num_samples = int(samples.sum())
        token_slots, positions, tile_part, count, sample_tokens, sample_slots, sample_positions = np.split(
            out[: self.size], self._cuts()[:-1]
        )
        token_slots[:num_tokens] = np.repeat(slots, counts)
        token_slots[num_tokens:] = spare
        positions[:num_tokens] = np.arange(num_tokens, dtype=np.int32) + np.repeat(starts - ends + counts, counts)
        positions[num_tokens:] = 0
        tile_part[: tiles.size] = tiles.ravel()
        tile_part[tiles.size :] = 0
        count[0] = num_decode_rows
        sample_tokens[:num_samples] = ends[samples] - 1
        sample_tokens[num_samples:] = 0
        sample_slots[:num_samples] = slots[samples]
        sample_slots[num_samples:] = spare
        sample_positions[:num_samples] = (starts + counts)[samples]
        sample_positions[num_samples:] = 0


def count_decode_rows(rows: Sequence[Row]) -> int:
    """Leading rows of one token; the scheduler puts them first."""
    return next((index for index, row in enumerate(rows) if row.num_tokens > 1), len(rows))


def cut_tiles(
    rows: Sequence[tuple[int, int, int]], first_token: int, *, height: int = TILE_TOKENS, library: bool = False
) -> tuple[Ints, tuple[tuple[int, int], ...]]:
    """Rows behind the decode rows, as (line of block_tables, first position, tokens), cut into tiles int32 [n, 4].

    With ``library``, fresh rows at the end that are long enough are left to a library: their (first token, count) come
    second. Tiles that see more keys come first, so that none of the long ones is left over at the end.
    """
    begins = np.cumsum([first_token] + [count for _, _, count in rows]).tolist()
    first_fresh = len(rows)
    while library and first_fresh > 0 and rows[first_fresh - 1][1] == 0:
        if rows[first_fresh - 1][2] < MIN_LIBRARY_TOKENS:
            break
        first_fresh -= 1
    tiles = [
        (begin + at, min(height, count - at), start + at, table)
        for begin, (table, start, count) in zip(begins, rows[:first_fresh], strict=False)
        for at in range(0, count, height)
    ]
    tiles.sort(key=lambda tile: -tile[2])
    fresh = tuple((begins[index], rows[index][2]) for index in range(first_fresh, len(rows)))
    return np.array(tiles, dtype=np.int32).reshape(-1, 4), fresh

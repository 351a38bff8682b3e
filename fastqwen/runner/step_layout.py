"""A GPU step as one array of whole numbers: filled on the host, copied once, read by every kernel.

A recorded step has a layout of its own whose sizes are upper bounds; what a step does not need of it is padded with
tokens and rows of the spare slot, whose results nobody reads, and with empty tiles.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fastqwen.kernels.limits import TILE_TOKENS
from fastqwen.records import Row

MIN_LIBRARY_TOKENS = 1024  # shorter fresh prompts are cheaper as tiles of one launch than as launches of their own

Ints = NDArray[np.int32]


@dataclass(frozen=True)
class StepInputs:
    """Views of the array on the device."""

    slots: Tensor  # int32 [tokens]
    positions: Tensor  # int32 [tokens]
    tiles: Tensor  # int32 [tiles, 4], as PromptTiles has them
    decode_count: Tensor  # int32 [1]
    sample_tokens: Tensor  # int32 [samples]: the token whose hidden state gives the row's logits
    sample_slots: Tensor  # int32 [samples]
    sample_positions: Tensor  # int32 [samples]: of the token that is to be sampled
    row_starts: Tensor  # int32 [rows + 1], as StepTokens has them
    held: Tensor  # int32 [rows], as StepTokens has it


@dataclass(frozen=True)
class StepLayout:
    tokens: int
    tiles: int
    rows: int
    samples: int

    @classmethod
    def of(cls, rows: Sequence[Row], num_tiles: int) -> StepLayout:
        """Exactly as large as a step."""
        num_tokens, num_samples = sum(row.num_tokens for row in rows), sum(row.num_logits for row in rows)
        return cls(num_tokens, num_tiles, len(rows), num_samples)

    @property
    def size(self) -> int:
        return sum(self._sizes())

    def _sizes(self) -> tuple[int, ...]:
        samples = self.samples
        return self.tokens, self.tokens, 4 * self.tiles, 1, samples, samples, samples, self.rows + 1, self.rows

    def _parts(self) -> Iterator[slice]:
        """Of the array, in the order of StepInputs."""
        ends = itertools.accumulate(self._sizes(), initial=0)
        return itertools.starmap(slice, itertools.pairwise(ends))

    def views(self, array: Tensor) -> StepInputs:
        """``array`` int32 [at least size], on the device."""
        slots, positions, tiles, *others = [array[part] for part in self._parts()]
        return StepInputs(slots, positions, tiles.view(self.tiles, 4), *others)

    def fill(self, out: Ints, rows: Sequence[Row], tiles: Ints, num_decode_rows: int, spare: int) -> None:
        """Write a step into ``out`` int32 [at least size]. The step's own sizes may be smaller than the layout's."""
        row_slots = np.fromiter((row.slot for row in rows), np.int32, len(rows))
        starts = np.fromiter((row.start for row in rows), np.int32, len(rows))
        counts = np.fromiter((row.num_tokens for row in rows), np.int32, len(rows))
        logits = np.fromiter((row.num_logits for row in rows), np.int32, len(rows))
        ends = np.cumsum(counts, dtype=np.int32)
        num_tokens = int(ends[-1])
        tokens = np.arange(num_tokens, dtype=np.int32)
        slots, positions, tile_part, count, sample_tokens, sample_slots, sample_positions, row_starts, held = [
            out[part] for part in self._parts()
        ]
        slots[:num_tokens] = np.repeat(row_slots, counts)
        slots[num_tokens:] = spare
        positions[:num_tokens] = tokens + np.repeat(starts - ends + counts, counts)
        positions[num_tokens:] = 0
        tile_part[: tiles.size] = tiles.ravel()
        tile_part[tiles.size :] = 0
        count[0] = num_decode_rows
        # A row's logits are of its last tokens; each says which token comes at the next position.
        sampled = np.flatnonzero(tokens >= np.repeat(ends - logits, counts))
        num_samples = len(sampled)
        sample_tokens[:num_samples] = sampled
        sample_tokens[num_samples:] = 0
        sample_slots[:num_samples] = slots[sampled]
        sample_slots[num_samples:] = spare
        sample_positions[:num_samples] = positions[sampled] + 1
        sample_positions[num_samples:] = 0
        row_starts[0] = 0
        row_starts[1 : len(rows) + 1] = ends
        row_starts[len(rows) + 1 :] = num_tokens
        held[: len(rows)] = starts + np.fromiter((row.repeats for row in rows), np.int32, len(rows))
        held[len(rows) :] = 0


def count_decode_rows(rows: Sequence[Row]) -> int:
    """Leading rows of one token; the scheduler puts them first."""
    return next((index for index, row in enumerate(rows) if row.num_tokens > 1), len(rows))


def cut_tiles(
    rows: Sequence[tuple[int, int, int]], first_token: int, *, height: int = TILE_TOKENS, library: bool = False
) -> tuple[Ints, tuple[tuple[int, int], ...]]:
    """Rows behind the decode rows, as (slot, first position, tokens), cut into tiles int32 [n, 4].

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
        (begin + at, min(height, count - at), start + at, slot)
        for begin, (slot, start, count) in zip(begins, rows[:first_fresh], strict=False)
        for at in range(0, count, height)
    ]
    tiles.sort(key=lambda tile: -tile[2])
    fresh = tuple((begins[index], rows[index][2]) for index in range(first_fresh, len(rows)))
    return np.array(tiles, dtype=np.int32).reshape(-1, 4), fresh

"""A step as one array of whole numbers: what is in it, and that padding belongs to the spare slot."""

from __future__ import annotations

import numpy as np
import torch

from fastqwen.records import Row
from fastqwen.runner.step_layout import MIN_LIBRARY_TOKENS, StepLayout, count_decode_rows, cut_tiles

SPARE = 9


def row(slot: int, start: int, num_tokens: int, num_logits: int = 1) -> Row:
    return Row(slot=slot, request_id="", start=start, num_tokens=num_tokens, new_blocks=(), num_logits=num_logits)


def test_a_step_with_decode_rows_and_prompts():
    rows = [row(3, 20, 1), row(1, 7, 1), row(0, 4, 3, num_logits=0), row(2, 0, 2)]
    decode = count_decode_rows(rows)
    assert decode == 2
    tiles, fresh = cut_tiles([(one.slot, one.start, one.num_tokens) for one in rows[decode:]], decode, height=2)
    assert not fresh
    # first token, tokens, first position, slot: those that see the most keys come first
    assert tiles.tolist() == [[4, 1, 6, 0], [2, 2, 4, 0], [5, 2, 0, 2]]
    layout = StepLayout(tokens=9, tiles=5, rows=6, samples=4)
    array = np.full(layout.size, -7, dtype=np.int32)
    layout.fill(array, rows, tiles, decode, SPARE)
    found = layout.views(torch.from_numpy(array))
    assert found.slots.tolist() == [3, 1, 0, 0, 0, 2, 2, SPARE, SPARE]
    assert found.positions.tolist() == [20, 7, 4, 5, 6, 0, 1, 0, 0]
    assert found.tiles.tolist() == [*tiles.tolist(), [0] * 4, [0] * 4]
    assert found.decode_count.tolist() == [2]
    assert found.sample_tokens.tolist() == [0, 1, 6, 0]
    assert found.sample_slots.tolist() == [3, 1, 2, SPARE]
    assert found.sample_positions.tolist() == [21, 8, 2, 0]
    assert found.row_starts.tolist() == [0, 1, 2, 5, 7, 7, 7]


def test_a_row_may_ask_for_several_logits():
    rows = [row(3, 20, 4, num_logits=3), row(1, 7, 2, num_logits=1)]
    layout = StepLayout.of(rows, 0)
    array = np.zeros(layout.size, dtype=np.int32)
    layout.fill(array, rows, np.zeros((0, 4), dtype=np.int32), 0, SPARE)
    found = layout.views(torch.from_numpy(array))
    assert found.sample_tokens.tolist() == [1, 2, 3, 5]
    assert found.sample_slots.tolist() == [3, 3, 3, 1]
    assert found.sample_positions.tolist() == [22, 23, 24, 9]


def test_a_decode_step_has_no_tiles():
    layout = StepLayout(tokens=2, tiles=0, rows=2, samples=2)
    array = np.zeros(layout.size, dtype=np.int32)
    tiles, _ = cut_tiles([], 1)
    layout.fill(array, [row(4, 8, 1)], tiles, 1, SPARE)
    found = layout.views(torch.from_numpy(array))
    assert found.tiles.shape == (0, 4)
    assert found.slots.tolist() == [4, SPARE] and found.sample_positions.tolist() == [9, 0]


def test_long_fresh_prompts_may_be_left_to_a_library():
    long = MIN_LIBRARY_TOKENS
    rows = [(0, 64, 500), (1, 0, 20), (2, 0, long), (3, 0, long + 5)]
    tiles, fresh = cut_tiles(rows, 7, library=True)
    assert fresh == ((7 + 520, long), (7 + 520 + long, long + 5))
    assert sum(tiles[:, 1]) == 520, "what goes on behind a cached part, and a short prompt, are tiles"
    everything, none = cut_tiles(rows, 7)
    assert not none and sum(everything[:, 1]) == 520 + 2 * long + 5

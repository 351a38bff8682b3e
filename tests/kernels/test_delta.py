"""The gated delta rule: chunks against the recurrence, and the Triton kernels against both, through Triton's interpreter where
there is no GPU."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

from fastqwen.kernels import DeltaParts, DeltaShape, DeltaState, HeadShape, Norm, StepTokens  # noqa: E402
from fastqwen.kernels.reference import ReferenceOps  # noqa: E402
from fastqwen.kernels.reference_delta import chunked, recurrent  # noqa: E402
from fastqwen.kernels.triton.ops import TritonOps  # noqa: E402
from tests.kernels.batches import make_batch  # noqa: E402

REFERENCE = ReferenceOps()
SHAPES = [DeltaShape(1, 2, 16, 40, 4), DeltaShape(2, 2, 32, 16, 4)]
TOLERANCE = {torch.float32: 2e-4, torch.float16: 1e-2}


@pytest.fixture(scope="module")
def ops() -> TritonOps:
    return TritonOps(torch.device(DEVICE))


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape).to(dtype).to(DEVICE)


def make_parts(shape: DeltaShape, dtype: torch.dtype) -> DeltaParts:
    heads = shape.num_value_heads
    conv = 0.5 * random(shape.channels, shape.taps)
    return DeltaParts(
        shape, conv.to(dtype), -random(heads).exp() / 8, random(heads), Norm(random(shape.value_dim), 1e-6)
    )


def make_step(rows: list[tuple[int, int]], shape: DeltaShape, dtype: torch.dtype) -> tuple[StepTokens, DeltaState]:
    """``rows`` are (tokens in the state before, new tokens). Slots that hold nothing are full of NaN."""
    step, _ = make_batch(rows, HeadShape(1, 1, 16, 16), device=DEVICE)
    held = torch.tensor([start for start, _ in rows], dtype=torch.int32, device=DEVICE)
    slots = len(rows) + 2
    state = DeltaState(
        torch.full((slots, shape.num_value_heads, shape.key_dim, shape.value_dim), float("nan"), device=DEVICE),
        torch.full((slots, shape.taps, shape.channels), float("nan"), dtype=dtype, device=DEVICE),
    )
    for row, (start, _) in enumerate(rows):
        slot = int(step.slots[int(step.row_starts[row])])
        if start:
            state.memory[slot] = random(*state.memory.shape[1:])
        for position in range(max(0, start - shape.taps), start):
            state.inputs[slot, position % shape.taps] = random(shape.channels, dtype=dtype)
    return replace(step, held=held), state


def copied(state: DeltaState) -> DeltaState:
    return DeltaState(state.memory.clone(), state.inputs.clone())


def close(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    size = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    torch.testing.assert_close(found.float(), expected.float(), equal_nan=True, **size)


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 150])
def test_chunks_are_the_recurrence(tokens: int):
    """Also where the same key comes again and again, and nothing fades."""
    q, k = (torch.nn.functional.normalize(torch.randn(3, tokens, 16), dim=-1) for _ in range(2))
    k[0] = k[0, :1]
    fade = -torch.rand(3, tokens) * torch.tensor([[0.0], [0.1], [30.0]])
    arguments = q, k, torch.randn(3, tokens, 8), fade, torch.rand(3, tokens), torch.randn(3, 16, 8)
    for found, expected in zip(chunked(*arguments), recurrent(*arguments), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_prompt_in_pieces_is_the_prompt(shape: DeltaShape):
    parts = make_parts(shape, torch.float32)
    step, state = make_step([(0, 80)], shape, torch.float32)
    projected = random(80, shape.width)
    expected = REFERENCE.gated_delta(projected, step, state, parts)
    pieces, other = [], copied(state)
    for start, stop in ((0, 1), (1, 3), (3, 70), (70, 71), (71, 80)):
        row_starts = torch.tensor([0, stop - start], dtype=torch.int32, device=DEVICE)
        part = replace(step.part(start, stop), row_starts=row_starts, held=torch.full_like(step.held, start))
        pieces.append(REFERENCE.gated_delta(projected[start:stop], part, other, parts))
    close(torch.cat(pieces), expected, torch.float32)
    close(other.memory, state.memory, torch.float32)
    assert torch.equal(other.inputs, state.inputs) or torch.isnan(state.inputs).any()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    "rows", [[(5, 1), (0, 1), (2, 1)], [(0, 70)], [(9, 1), (0, 1), (40, 65), (0, 2), (3, 7), (1, 64)]], ids=str
)
def test_kernels(ops: TritonOps, dtype: torch.dtype, shape: DeltaShape, rows: list[tuple[int, int]]):
    parts = make_parts(shape, dtype)
    step, state = make_step(rows, shape, dtype)
    other = copied(state)
    projected = random(int(step.row_starts[-1]), shape.width + 3, dtype=dtype)
    close(ops.gated_delta(projected, step, state, parts), REFERENCE.gated_delta(projected, step, other, parts), dtype)
    close(state.memory, other.memory, dtype)
    close(state.inputs, other.inputs, dtype)


@pytest.mark.parametrize("which", [ReferenceOps(), TritonOps(torch.device(DEVICE))], ids=lambda ops: ops.name)
def test_a_token_that_is_computed_again_changes_nothing(which: ReferenceOps):
    shape = SHAPES[0]
    parts = make_parts(shape, torch.float32)
    step, state = make_step([(6, 1), (0, 1)], shape, torch.float32)
    projected = random(2, shape.width)
    expected = which.gated_delta(projected, step, state, parts)
    before = copied(state)
    found = which.gated_delta(projected, replace(step, held=step.held + 1), state, parts)
    close(found, expected, torch.float32)
    close(state.memory, before.memory, torch.float32)
    close(state.inputs, before.inputs, torch.float32)


@pytest.mark.parametrize("decode", [0, 2])
def test_a_recorded_step_with_room_to_spare(ops: TritonOps, decode: int):
    """Fewer decode rows, rows and tokens than a graph has room for: the rest changes nothing."""
    shape, rows = SHAPES[0], [(40, 1)] * decode + [(33, 17), (0, 70)]
    parts = make_parts(shape, torch.float32)
    step, state = make_step(rows, shape, torch.float32)
    other = copied(state)
    tokens, room, most_rows = int(step.row_starts[-1]), 128, 8
    spare = state.memory.shape[0] - 1

    def padded(values: torch.Tensor, fill: int, size: int) -> torch.Tensor:
        return torch.cat([values, torch.full((size - len(values),), fill, dtype=values.dtype, device=DEVICE)])

    recorded = replace(
        step,
        positions=padded(step.positions, 0, room),
        slots=padded(step.slots, spare, room),
        row_starts=padded(step.row_starts, tokens, most_rows + 1),
        held=padded(step.held, 0, most_rows),
        num_decode_rows=most_rows,
        decode_count=torch.tensor([decode], dtype=torch.int32, device=DEVICE),
    )
    projected = random(room, shape.width)
    found = ops.gated_delta(projected, recorded, state, parts)
    close(found[:tokens], REFERENCE.gated_delta(projected[:tokens], step, other, parts), torch.float32)
    close(state.memory, other.memory, torch.float32)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_gates(ops: TritonOps, dtype: torch.dtype):
    x, wide = random(3, 40, dtype=dtype), random(3, 100, dtype=dtype)
    expected = x.clone()
    ops.multiply_by_sigmoid(x, wide[:, 60:])
    REFERENCE.multiply_by_sigmoid(expected, wide[:, 60:])
    close(x, expected, dtype)

"""What the planner says of the engine's habits."""

from __future__ import annotations

import pytest

from fastqwen.kernels.limits import MIB, feed_forward_rows, graph_batches, graph_tokens
from fastqwen.plan.allocator import Allocator, rounded_up_bytes, segment_bytes
from fastqwen.plan.buffers import Sizes, graph_buffers, largest_steps
from fastqwen.plan.catalog import find_published


def test_segments_of_the_allocator():
    assert [segment_bytes(size) for size in (1, MIB, MIB + 1, 10 * MIB - 1, 10 * MIB, 11 * MIB)] == [
        2 * MIB, 2 * MIB, 20 * MIB, 20 * MIB, 10 * MIB, 12 * MIB,
    ]  # fmt: skip
    assert rounded_up_bytes(3 * MIB) == 3 * MIB
    assert rounded_up_bytes(31 * MIB) == 32 * MIB


def test_what_was_freed_is_used_again_and_grows_together():
    memory = Allocator()
    memory.take("a", 64 * MIB)
    memory.drop("a")
    memory.take("b", 30 * MIB)  # cut from a's segment
    memory.take("c", 34 * MIB)
    assert memory.reserved == memory.allocated == 64 * MIB
    memory.drop("b", "c")
    memory.take("d", 64 * MIB)  # both pieces are one again
    assert memory.reserved == 64 * MIB
    memory.take("d", 20 * MIB)  # the new one exists before the old one goes
    assert (memory.reserved, memory.allocated, memory.most_allocated) == (84 * MIB, 20 * MIB, 84 * MIB)


def test_pieces_apart_hold_nothing_larger_than_themselves():
    memory = Allocator()
    for name in "abc":
        memory.take(name, 40 * MIB)
    memory.drop("a", "c")
    memory.take("large", 80 * MIB)
    assert memory.reserved == 200 * MIB
    assert memory.allocated == 120 * MIB


def sizes_of(name: str) -> Sizes:
    found = find_published(name)
    assert found is not None
    return Sizes.of(found.model, 1, 2, library_attention=True)


def test_a_step_of_the_dense_model_by_hand():
    """Qwen3-8B, 8192 tokens: residual, q, k and v as computed, rotated q, k and v, and two outputs live together in
    attention; the feed-forward part, in chunks of 4096 tokens, has less."""
    taken = largest_steps(sizes_of("Qwen3-8B"), 8192, 1)
    step = 8192 * (2 * (4096 + 6144 + 6144 + 2 * 4096) + 4 * 128)
    assert taken.layers == pytest.approx(step, rel=0.001)
    assert taken.total == pytest.approx(taken.layers, rel=0.01)  # one row of logits is nothing against it
    assert taken.layers < taken.reserved < 2 * taken.layers


def test_wide_activations_are_made_in_chunks():
    assert feed_forward_rows(8192, 6144) == 8192, "Qwen3-0.6B: 96 MiB are no reason to cut"
    assert feed_forward_rows(8192, 24576) == 4096
    assert feed_forward_rows(4000, 24576) == 4000
    assert feed_forward_rows(4200, 24576) == 4200, "one part, as long as all of it stays below 200 MiB"


def test_graphs_share_what_they_leave_behind():
    sizes = sizes_of("Qwen3-8B")
    batches = graph_batches(256)
    logits = 256 * 151936 * 2
    alone = graph_buffers(sizes, (256,), (), 256)
    assert logits < alone < 2 * logits
    assert graph_buffers(sizes, batches, (), 256) < 1.2 * alone
    assert graph_buffers(sizes, (1,), (), 1) < 8 * MIB
    assert graph_buffers(sizes, batches, graph_tokens(8192), 256) < 2048 * 2 * 60_000 + logits

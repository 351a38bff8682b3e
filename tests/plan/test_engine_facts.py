"""The planner imports nothing of the engine, so what it says of the engine's habits is compared with the sources here."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest

from fastqwen.plan import facts
from fastqwen.plan.allocator import Allocator, rounded_up_bytes, segment_bytes
from fastqwen.plan.buffers import Sizes, graph_buffers, largest_steps
from fastqwen.plan.catalog import find_published
from fastqwen.plan.facts import MIB

PACKAGE = Path(facts.__file__).parents[1]


def constant(path: str, name: str) -> int:
    """A module's constant, or a parameter's default, of a source that cannot be imported here."""
    tree = ast.parse((PACKAGE / path).read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
            return _value(node.value)
        if isinstance(node, ast.FunctionDef):
            arguments = [*node.args.posonlyargs, *node.args.args]
            for argument, default in zip(
                arguments[-len(node.args.defaults) or None :], node.args.defaults, strict=False
            ):
                if argument.arg == name:
                    return _value(default)
    raise AssertionError(f"{path} has no {name}")


def _value(node: ast.expr) -> int:
    """Products and powers of numbers."""
    if isinstance(node, ast.BinOp):
        left, right = _value(node.left), _value(node.right)
        return left**right if isinstance(node.op, ast.Pow) else left * right
    assert isinstance(node, ast.Constant)
    return int(node.value)


@pytest.mark.parametrize(
    ("fact", "path", "name"),
    [
        ("FUSED_ROWS", "kernels/triton/linear.py", "MAX_ROWS"),
        ("SPLIT_PARTS", "kernels/triton/linear.py", "max_parts"),
        ("SPLIT_BLOCKS", "kernels/triton/linear.py", "max_blocks"),
        ("DECODE_PARTS", "kernels/triton/ops.py", "MAX_DECODE_PARTS"),
        ("DECODE_ROWS", "kernels/triton/ops.py", "MAX_DECODE_ROWS"),
        ("SAMPLE_CHUNK", "kernels/triton/step.py", "CHUNK"),
        ("UNPACK_BYTES", "kernels/reference.py", "UNPACKED_BYTES"),
    ],
)
def test_scratch_is_as_large_as_the_kernels_make_it(fact: str, path: str, name: str):
    assert getattr(facts, fact) == constant(path, name)


@pytest.mark.parametrize("count", [1, 3, 16, 64, 100, 256, 300, 2048])
def test_graphs_are_captured_for_the_batches_that_are_planned(count: int):
    tree = ast.parse((PACKAGE / "runner/cuda_runner.py").read_text())
    source = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "graph_sizes")
    names: dict[str, Any] = {}
    exec(ast.unparse(source), names)  # importing the module would import Triton
    assert list(facts.graph_batches(count)) == names["graph_sizes"](count)


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
    """Qwen3-8B, 8192 tokens: the residual and three times the inner size (gate, up, product) live together."""
    taken = largest_steps(sizes_of("Qwen3-8B"), 8192, 1)
    step = 8192 * (2 * (4096 + 3 * 12288) + 4 * 128 + 32)
    assert taken.layers == pytest.approx(step, rel=0.001)
    assert taken.total == pytest.approx(taken.layers, rel=0.01)  # one row of logits is nothing against it
    assert taken.layers < taken.reserved < 2 * taken.layers


def test_each_graph_keeps_its_own_logits():
    sizes = sizes_of("Qwen3-8B")
    batches = facts.graph_batches(256)
    logits = sum(batches) * 151936 * 2
    assert logits < graph_buffers(sizes, batches) < 1.15 * logits
    assert graph_buffers(sizes, (1,)) < 8 * MIB

"""Shards in threads, a sum as the collective, give the tokens of one."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastqwen.build import build_decoder
from fastqwen.errors import BadCheckpoint
from fastqwen.kernels import GroupedWeight, StateRoom
from fastqwen.kernels.reference import ReferenceOps, unpack_grouped
from fastqwen.layers.linear import GroupedLinear
from fastqwen.models import parse_config
from fastqwen.plan.shards import uneven_sizes
from fastqwen.quant import LinearSpec
from fastqwen.quant.gptq import Gptq
from fastqwen.sharding import Alone, HeadSplit, Part, Ranges, World, even_size
from fastqwen.weights.checkpoint import open_checkpoint
from fastqwen.weights.source import Weights, cut
from tests.kernels.batches import one_prompt
from tests.models.tiny import MOE, make, make_qwen1, prompt

QWEN2 = {  # Qwen2-72B
    "model_type": "qwen2", "hidden_size": 8192, "intermediate_size": 29568, "num_hidden_layers": 80, "vocab_size": 152064,
    "num_attention_heads": 64, "num_key_value_heads": 8,
}  # fmt: skip

HYBRID = {
    "head_dim": 32, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16,
    "linear_value_head_dim": 24, "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip


class Shard:
    """Threads that meet at a barrier and add up what each has laid down."""

    def __init__(self, index: int, barrier: threading.Barrier, table: list[torch.Tensor | None]) -> None:
        self.index, self.count = index, len(table)
        self._barrier, self._table = barrier, table

    def _meet(self, x: torch.Tensor) -> list[Any]:
        self._table[self.index] = x.clone()
        self._barrier.wait(30)
        found = list(self._table)
        self._barrier.wait(30)
        return found

    def all_reduce(self, x: torch.Tensor) -> None:
        x.copy_(sum(self._meet(x)))

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat(self._meet(x), dim=-1)

    def broadcast(self, x: torch.Tensor) -> None:
        x.copy_(self._meet(x)[0])

    def prepare(self, width: int, dtype: torch.dtype) -> None: ...

    def takes_parts(self, residual: torch.Tensor) -> bool:
        return False

    def add_parts(self, residual: torch.Tensor, part: torch.Tensor) -> None:
        raise AssertionError("not taken")


def logits(folder: Path, ids: list[int], world: World) -> torch.Tensor:
    checkpoint = open_checkpoint(folder)
    assert checkpoint.tensors is not None
    weights = Weights(checkpoint.tensors, torch.float64, torch.device("cpu"))
    model, count = checkpoint.model, len(ids)
    decoder = build_decoder(model, weights, ReferenceOps(), world=world)
    step = one_prompt(model, count)
    states = decoder.make_states(StateRoom(1, count, 1, torch.float64, torch.device("cpu")))
    return decoder.logits(decoder.hidden(torch.tensor(ids, dtype=torch.int32), step, states))


def in_shards(folder: Path, ids: list[int], count: int) -> list[torch.Tensor]:
    """The logits that each shard has in the end."""
    barrier, table = threading.Barrier(count), [None] * count
    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(lambda index: logits(folder, ids, Shard(index, barrier, table)), range(count)))


@pytest.mark.parametrize(
    ("kind", "changes", "counts"),
    [
        ("Qwen2Config", {"tie_word_embeddings": True}, (2, 3, 4)),
        ("Qwen3Config", {"head_dim": 32, "num_key_value_heads": 1, "vocab_size": 255}, (2, 3, 8)),
        # Groups of 5 query heads over 4 shards of 2 key heads: 3 and 2, filled up to 3.
        ("Qwen3Config", {"head_dim": 32, "num_attention_heads": 10, "num_key_value_heads": 2}, (3, 4)),
        ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}, (2, 3)),
        ("Qwen2MoeConfig", {**MOE, "shared_expert_intermediate_size": 80}, (2, 3)),
        ("Qwen3_5TextConfig", HYBRID, (2, 3, 4)),
        # Groups of 3 value heads over 2 shards of a key head: 2 and 1, filled up to 2.
        ("Qwen3_5TextConfig", {**HYBRID, "linear_num_value_heads": 6}, (2, 3, 4)),
        ("Qwen3NextConfig", {**HYBRID, **MOE, "shared_expert_intermediate_size": 80}, (2, 3, 4)),
        ("Qwen3NextConfig", {**HYBRID, **MOE, "linear_num_key_heads": 4, "linear_num_value_heads": 12}, (3, 5)),
    ],
)
def test_shards_compute_what_one_does(tmp_path: Path, kind: str, changes: dict[str, Any], counts: tuple[int, ...]):
    make(tmp_path, kind, num_hidden_layers=2, **changes)
    ids = prompt(20)
    expected = logits(tmp_path, ids, Alone())
    for count in counts:
        for one in in_shards(tmp_path, ids, count):
            torch.testing.assert_close(one, expected, rtol=0, atol=1e-4)  # norms are float32 whatever the weights are
            assert torch.equal(one.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize("count", [2, 3, 4])
def test_one_matrix_of_queries_keys_and_values_is_split(tmp_path: Path, count: int):
    make_qwen1(tmp_path)
    ids = prompt(20)
    expected = logits(tmp_path, ids, Alone())
    for one in in_shards(tmp_path, ids, count):
        torch.testing.assert_close(one, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "count", "own", "own_kv"),
    [(40, 40, 3, 14, 14), (40, 8, 2, 20, 4), (28, 4, 8, 4, 1), (64, 4, 8, 8, 1), (14, 2, 3, 7, 1), (2, 1, 4, 1, 1)],
)
def test_every_head_is_somewhere_once(heads: int, kv_heads: int, count: int, own: int, own_kv: int):
    split = HeadSplit.of(heads, kv_heads, count)
    assert (split.each * split.piece, split.each) == (own, own_kv)
    found: list[int] = []
    for index in range(count):
        queries, keys = split.queries(index, 1), split.keys(index, 1)
        assert Part(0, queries).size == own and Part(0, keys).size == own_kv
        line = [one for start, stop in queries for one in range(start, stop)]  # zeros are negative
        key_line = [one for start, stop in keys for one in range(start, stop)]
        for place, head in enumerate(line):
            if head >= 0:
                found.append(head)
                assert key_line[place // split.piece] == head // (heads // kv_heads)
    assert sorted(found) == list(range(heads))


def test_quantized_feed_forward_parts_are_cut_between_groups():
    model = parse_config({**QWEN2, "quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}}, "x")
    assert model.local(8).intermediate_size == 29 * 128  # 231 groups
    assert [even_size(231 * 128, 8, model.inner_unit)] == [29 * 128]
    [line] = uneven_sizes(model, 8)
    assert "feed-forward size as 29696 instead of 29568 (+0%)" in line and "heads" not in line
    assert uneven_sizes(model, 1) == [] and "heads as 72 instead of 64 (+12%)" in uneven_sizes(model, 3)[0]


class Packed:
    """A checkpoint of one GPTQ matrix, 128 inputs and 48 outputs, 4 bits, groups of 32."""

    def __init__(self, *, shuffled: bool) -> None:
        generator = torch.Generator().manual_seed(3)

        def words(*shape: int) -> torch.Tensor:
            return torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int64, generator=generator).int()

        order = torch.randperm(128, generator=generator) if shuffled else torch.arange(128)
        self._tensors = {
            "m.qweight": words(16, 48), "m.qzeros": words(4, 6), "m.scales": torch.rand(4, 48, generator=generator).half(),
            "m.g_idx": (order // 32).int(), "m.bias": torch.rand(48, generator=generator).half(),
        }  # fmt: skip

    def names(self) -> list[str]:
        return list(self._tensors)

    def location(self, name: str) -> str:
        return "packed.safetensors"

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def read(self, name: str, part: Part | None = None) -> torch.Tensor:
        return cut(self._tensors[name], part)


def packed(spec: LinearSpec, *, shuffled: bool) -> GroupedWeight:
    method = Gptq(bits=4, group_size=32, desc_act=shuffled, zero_offset=1)
    weights = Weights(Packed(shuffled=shuffled), torch.float32, torch.device("cpu"))
    linear = method.linear(weights, spec, ReferenceOps())
    assert isinstance(linear, GroupedLinear)
    return linear.weight


@pytest.mark.parametrize("shuffled", [False, True])
def test_packed_matrices_are_split_by_outputs_and_by_inputs(shuffled: bool):
    spec = LinearSpec(("m",), 128, (48,), bias=True)
    whole = unpack_grouped(packed(spec, shuffled=shuffled), 0, 48)
    outputs: Ranges = ((8, 16), (32, 48))
    some = packed(replace(spec, outputs=(outputs,)), shuffled=shuffled)
    lines = [line for start, stop in outputs for line in range(start, stop)]
    assert torch.equal(unpack_grouped(some, 0, len(lines)), whole[lines])
    bias = packed(spec, shuffled=shuffled).bias
    assert some.bias is not None and bias is not None and torch.equal(some.bias, bias[lines])
    some = packed(replace(spec, inputs=((32, 96),), adds_bias=False), shuffled=shuffled)
    assert torch.equal(unpack_grouped(some, 0, 48), whole[:, 32:96]) and some.bias is None


@pytest.mark.parametrize("shuffled", [False, True])
def test_a_split_may_go_through_a_group_and_behind_the_end(shuffled: bool):
    spec = LinearSpec(("m",), 128, (48,), bias=False)
    whole = unpack_grouped(packed(spec, shuffled=shuffled), 0, 48)
    some = packed(replace(spec, inputs=((80, 128), (-16, 0)), adds_bias=False), shuffled=shuffled)
    found = unpack_grouped(some, 0, 48)
    assert torch.equal(found[:, :48], whole[:, 80:128]) and not found[:, 48:].any()


def test_a_split_inside_a_word_is_refused_by_name():
    spec = LinearSpec(("m",), 128, (48,), bias=True, inputs=((0, 44),))
    with pytest.raises(BadCheckpoint, match=r"m\.qweight cannot be split at .*8 numbers of a word"):
        packed(spec, shuffled=False)


@pytest.mark.parametrize(("dtype", "number_bytes", "scale_bytes"), [(torch.bfloat16, 2, 0), (torch.int8, 1, 2)])
def test_layers_allocate_what_the_planner_counts(
    tmp_path: Path, dtype: torch.dtype, number_bytes: int, scale_bytes: int
):
    make(tmp_path, "Qwen3Config", head_dim=32)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.tensors is not None
    weights = Weights(checkpoint.tensors, torch.float32, torch.device("cpu"))
    decoder = build_decoder(checkpoint.model, weights, ReferenceOps())
    states: list[Any] = decoder.make_states(StateRoom(5, 16, 3, dtype, torch.device("cpu")))
    tensors = [one for state in states for one in (state.k, state.v, state.k_scale, state.v_scale) if one is not None]
    counted = checkpoint.model.kv_bytes_per_token(number_bytes, scale_bytes)
    assert sum(one.nbytes for one in tensors) == 5 * 16 * counted

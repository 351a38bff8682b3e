"""Two shards in two threads, a sum as the collective, give the tokens of one."""

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
from fastqwen.quant import LinearSpec
from fastqwen.quant.gptq import Gptq
from fastqwen.sharding import Alone, Part, Ranges, World
from fastqwen.weights.checkpoint import open_checkpoint
from fastqwen.weights.source import Weights, cut
from tests.kernels.batches import one_prompt
from tests.models.tiny import MOE, make, prompt

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


def logits(folder: Path, ids: list[int], world: World) -> torch.Tensor:
    checkpoint = open_checkpoint(folder)
    assert checkpoint.tensors is not None
    weights = Weights(checkpoint.tensors, torch.float64, torch.device("cpu"))
    model, count = checkpoint.model, len(ids)
    decoder = build_decoder(model, weights, ReferenceOps(), world=world)
    step = one_prompt(model, count)
    states = decoder.make_states(StateRoom(1, count, 1, torch.float64, torch.device("cpu")))
    return decoder.logits(decoder.hidden(torch.tensor(ids, dtype=torch.int32), step, states))


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("Qwen2Config", {"tie_word_embeddings": True}),
        ("Qwen3Config", {"head_dim": 32, "num_key_value_heads": 1, "vocab_size": 255}),
        ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
        ("Qwen2MoeConfig", {**MOE, "shared_expert_intermediate_size": 80}),
        ("Qwen3_5TextConfig", HYBRID),
        ("Qwen3NextConfig", {**HYBRID, **MOE, "shared_expert_intermediate_size": 80}),
    ],
)
def test_two_shards_compute_what_one_does(tmp_path: Path, kind: str, changes: dict[str, Any]):
    make(tmp_path, kind, num_hidden_layers=2, **changes)
    ids = prompt(20)
    expected = logits(tmp_path, ids, Alone())
    barrier, table = threading.Barrier(2), [None, None]
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(lambda index: logits(tmp_path, ids, Shard(index, barrier, table)), range(2)))
    for one in found:
        torch.testing.assert_close(one, expected, rtol=0, atol=1e-4)  # norms are float32 whatever the weights are
        assert torch.equal(one.argmax(-1), expected.argmax(-1))


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


def test_a_split_inside_a_group_is_refused_by_name():
    spec = LinearSpec(("m",), 128, (48,), bias=True, inputs=((0, 48),))
    with pytest.raises(BadCheckpoint, match=r"m\.qweight cannot be split at .*32 inputs of a group"):
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

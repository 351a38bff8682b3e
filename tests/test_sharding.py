"""Two shards in two threads, a sum as the collective, give the tokens of one."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from fastqwen.build import build_decoder
from fastqwen.kernels import StateRoom, StepTokens
from fastqwen.kernels.reference import ReferenceOps
from fastqwen.layers.rotary import inverse_frequencies
from fastqwen.sharding import Alone, World
from fastqwen.weights.checkpoint import open_checkpoint
from fastqwen.weights.source import Weights
from tests.models.tiny import MOE, make, prompt


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
    positions = torch.arange(count, dtype=torch.int32)
    angles = positions[:, None] * inverse_frequencies(model.rope, model.rotary_dim)[0]
    zeros = torch.zeros(count, dtype=torch.int32)
    step = StepTokens(
        positions=positions,
        slots=zeros,
        row_starts=torch.tensor([0, count], dtype=torch.int32),
        cos_sin=torch.cat([angles.cos(), angles.sin()], dim=-1),
        q_scale=None,
        block_tables=torch.zeros(1, 1, dtype=torch.int32),
        num_decode_rows=0,
    )
    states = decoder.make_states(StateRoom(1, count, 1, torch.float64, torch.device("cpu")))
    return decoder.logits(decoder.hidden(torch.tensor(ids, dtype=torch.int32), step, states))


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("Qwen2Config", {"tie_word_embeddings": True}),
        ("Qwen3Config", {"head_dim": 32, "num_key_value_heads": 1, "vocab_size": 255}),
        ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
        ("Qwen2MoeConfig", {**MOE, "shared_expert_intermediate_size": 80}),
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

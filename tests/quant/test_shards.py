"""FP8 and AWQ in shards: together they compute what one process does, wherever the cuts fall."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastqwen.sharding import Alone
from tests.models.tiny import MOE, make, make_qwen1, prompt
from tests.quant.packing import Layout
from tests.quant.storing import store_twice
from tests.quant.test_awq import CONFIG, in_groups
from tests.quant.test_fp8 import LAYOUTS
from tests.quant.test_hybrids import PLAIN, of_gptq, tiny
from tests.test_sharding import in_shards, logits

METHODS = {**LAYOUTS, "awq": (in_groups(32), CONFIG)}


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("method", ["blocks", "cut-blocks", "matrix", "llm-compressor-outputs", "awq"])
def test_shards_compute_what_one_does(method: str, count: int, tmp_path: Path):
    make(tmp_path, "Qwen3Config", num_hidden_layers=1, head_dim=32, intermediate_size=192)
    stored, _ = store_twice(tmp_path, *METHODS[method])
    expected = logits(stored, prompt(12), Alone())
    for one in in_shards(stored, prompt(12), count):
        torch.testing.assert_close(one, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("method", ["blocks", "awq"])
def test_one_matrix_of_queries_keys_and_values_is_split(method: str, tmp_path: Path):
    make_qwen1(tmp_path)
    stored, _ = store_twice(tmp_path, *METHODS[method])
    expected = logits(stored, prompt(12), Alone())
    for one in in_shards(stored, prompt(12), 2):
        torch.testing.assert_close(one, expected, rtol=0, atol=1e-4)


def test_experts_are_split(tmp_path: Path):
    make(tmp_path, "Qwen3MoeConfig", **MOE, head_dim=16, norm_topk_prob=True)
    stored, _ = store_twice(tmp_path, *METHODS["blocks"])
    expected = logits(stored, prompt(12), Alone())
    for one in in_shards(stored, prompt(12), 2):
        torch.testing.assert_close(one, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize(("case", "method"), [("qwen3-5", "blocks"), ("qwen3-next", "blocks"), ("qwen3-5", "int4")])
def test_heads_of_hybrids_are_split(case: str, method: str, count: int, tmp_path: Path):
    """Of the delta rule's, 2 key heads of 2 value heads each; those of a third shard are copies or zeros."""
    tiny(tmp_path, case)
    store, config = (of_gptq(Layout()), Layout().config()) if method == "int4" else METHODS[method]
    stored, _ = store_twice(tmp_path, store, config, plain_modules=(*PLAIN, "shared_expert"))
    expected = logits(stored, prompt(12), Alone())
    for one in in_shards(stored, prompt(12), count):
        torch.testing.assert_close(one, expected, rtol=0, atol=1e-4)

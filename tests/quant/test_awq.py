"""AWQ: a checkpoint packed in the documented layout computes what its own dequantised weights compute."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastqwen import LLM, SamplingParams
from fastqwen.errors import BadCheckpoint
from fastqwen.model_config import read_json
from fastqwen.quant.awq import outputs_of
from tests.models.tiny import MOE, greedy, make, prompt, start
from tests.quant.storing import Stored, check, store_twice

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which of eight outputs stands in a word's first, second ... four bits
CONFIG = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}


def words_of(codes: Tensor) -> Tensor:
    """[n, out] -> int32 [n, out / 8]"""
    words = torch.zeros(codes.shape[0], codes.shape[1] // 8, dtype=torch.int64)
    for place, output in enumerate(ORDER):
        words |= codes[:, output::8].long() << (4 * place)
    return words.to(torch.int32)


def in_groups(size: int):
    def store(matrix: Tensor) -> Stored:
        width = matrix.shape[1] if size == -1 else size
        groups = matrix.view(matrix.shape[0], -1, width)  # [out, groups, inputs]
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        scales = ((high - low) / 15).clamp(min=1e-4).half()
        zeros = (-low / scales.float()).round().clamp(0, 15)
        codes = ((groups / scales.float()[..., None]).round() + zeros[..., None]).clamp(0, 15)
        plain = ((codes - zeros[..., None]) * scales.float()[..., None]).flatten(1)
        tensors = {"qweight": words_of(codes.flatten(1).t()), "qzeros": words_of(zeros.t()), "scales": scales.t()}
        return tensors, plain

    return store


def test_a_words_outputs_come_out_in_order():
    codes = torch.randint(0, 16, (5, 48), dtype=torch.uint8)
    assert outputs_of(words_of(codes)).equal(codes)


@pytest.mark.parametrize("size", [16, 32, -1])
@pytest.mark.parametrize("kind", ["Qwen2Config", "Qwen3Config"])
def test_the_same_logits_as_its_own_dequantised_weights(kind: str, size: int, tmp_path: Path):
    make(tmp_path, kind)
    check(*store_twice(tmp_path, in_groups(size), {**CONFIG, "group_size": size}))


def test_experts_and_plain_modules(tmp_path: Path):
    make(tmp_path, "Qwen3MoeConfig", **MOE, head_dim=16, norm_topk_prob=True)
    check(*store_twice(tmp_path, in_groups(16), {**CONFIG, "group_size": 16}, plain_modules=("v_proj",)))


def test_the_same_greedy_tokens_in_a_batch(tmp_path: Path):
    make(tmp_path, "Qwen2Config")
    stored, plain = store_twice(tmp_path, in_groups(32), CONFIG)
    prompts = [prompt(length) for length in (3, 63, 150)]
    assert greedy(start(stored), prompts, 16) == greedy(start(plain), prompts, 16)


def test_the_older_file_beside_config_json(tmp_path: Path):
    make(tmp_path, "Qwen2Config")
    stored, plain = store_twice(tmp_path, in_groups(32), CONFIG)
    config = read_json(stored / "config.json")
    del config["quantization_config"]
    (stored / "config.json").write_text(json.dumps(config))
    older = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}
    (stored / "quant_config.json").write_text(json.dumps(older))
    check(stored, plain)


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"bits": 8}, "bits is 8"), ({"version": "gemv"}, "gemv"), ({"zero_point": False}, "zero_point"),
     ({"group_size": 0}, "group_size"), ({"group_size": 24}, "groups of 24")],
)  # fmt: skip
def test_variants_that_are_refused(changes: dict[str, Any], words: str, tmp_path: Path):
    make(tmp_path, "Qwen2Config")
    stored, _ = store_twice(tmp_path, in_groups(32), {**CONFIG, **changes})
    with pytest.raises(BadCheckpoint) as caught:
        start(stored)
    assert words in str(caught.value) and str(stored) in str(caught.value)


def test_dummy_weights(tmp_path: Path):
    make(tmp_path, "Qwen2Config")
    stored, _ = store_twice(tmp_path, in_groups(32), CONFIG)
    llm = LLM(str(stored), load_format="dummy", skip_tokenizer_init=True, max_model_len=128, seed=1)
    [output] = llm.generate([[1, 2, 3]], SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True), use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 5

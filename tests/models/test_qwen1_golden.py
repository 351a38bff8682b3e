"""Qwen-1 against its original modelling code: logits, and greedy tokens however the engine cuts the work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastqwen import LLM, SamplingParams
from fastqwen.layers.rotary import inverse_frequencies, logn_scale
from fastqwen.layers.rotary_key import ntk_alpha, rope_key
from fastqwen.models import read_config
from fastqwen.records import Admission, Row
from tests.models.golden import check_logits, make_golden
from tests.models.tiny import greedy, hidden_of, start

LENGTHS = (100, 129, 300)


@pytest.fixture(scope="module")
def checkpoint(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("golden")
    make_golden(golden / "qwen1_tiny", folder)
    return folder


@pytest.fixture(scope="module")
def reference(golden: Path) -> Any:
    return np.load(golden / "qwen1_tiny" / "golden.npz")


def prompts(reference: Any) -> list[list[int]]:
    return [reference[f"prompt_{length}"].tolist() for length in LENGTHS]


def check(found: list[list[int]], reference: Any) -> None:
    for length, ids in zip(LENGTHS, found, strict=True):
        assert ids == reference[f"gen_{length}"].tolist()


def test_profiles(checkpoint: Path, reference: Any):
    model = read_config(checkpoint)
    for length in LENGTHS:
        [alpha] = {int(value) for value in reference[f"ntk_alpha_{length}"]}  # one for all 64 steps
        assert ntk_alpha(length, model.rope.trained_len) == alpha
        key = rope_key(model.rope, length, 64)
        found, scale = inverse_frequencies(model.rope, model.head_dim, key)
        name = next(name for name in reference.files if name.startswith("inv_freq_alpha_") and int(name[15:]) == alpha)
        np.testing.assert_allclose(found.numpy(), reference[name], rtol=1e-6)
        assert scale == 1.0
    for length, alpha in reference["ntk_alpha_for_len"].tolist():
        assert ntk_alpha(length, model.rope.trained_len) == alpha
    expected = reference["logn_first_700"].reshape(-1)
    np.testing.assert_allclose(logn_scale(torch.arange(len(expected)), 128).numpy(), expected, rtol=1e-6)


def test_prompt_logits(checkpoint: Path, reference: Any):
    for length in LENGTHS:
        runner: Any = start(checkpoint)._executor
        logits = _prompt_logits(runner, reference[f"prompt_{length}"].tolist())
        check_logits(logits, reference[f"logits_{length}"])


def test_teacher_forced_step_logits(checkpoint: Path, reference: Any):
    """Decoding keeps the alpha that the prompt's length gave, however long the sequence grows."""
    for length in LENGTHS:
        runner: Any = start(checkpoint)._executor
        ids = reference[f"prompt_{length}"].tolist() + reference[f"gen_{length}"].tolist()
        logits = _prompt_logits(runner, ids, num_prompt=length)[length - 1 : -1]
        check_logits(logits, reference[f"step_logits_{length}"])


def _prompt_logits(runner: Any, ids: list[int], num_prompt: int | None = None) -> Any:
    size = runner._plan.block_size
    key = rope_key(runner._model.rope, num_prompt or len(ids), 64)
    admission = Admission(
        slot=0,
        request_id="x",
        token_ids=ids,
        num_prompt_tokens=len(ids),
        sampling=SamplingParams(),
        seed=0,
        stop_token_ids=[],
        rope_key=key,
    )
    blocks = list(range(-(-len(ids) // size)))
    row = Row(slot=0, request_id="x", start=0, num_tokens=len(ids), new_blocks=tuple(blocks), num_logits=0)
    with torch.inference_mode():
        runner.slots.update([admission], [row])
        return runner._decoder.logits(hidden_of(runner, row)).cpu().numpy()


@pytest.mark.parametrize("length", LENGTHS)
def test_alone(checkpoint: Path, reference: Any, length: int):
    [found] = greedy(start(checkpoint), [reference[f"prompt_{length}"].tolist()])
    assert found == reference[f"gen_{length}"].tolist()


@pytest.mark.parametrize("chunk", [7, 64, 512])
def test_in_one_mixed_batch_under_any_chunking(checkpoint: Path, reference: Any, chunk: int):
    check(greedy(start(checkpoint, max_num_batched_tokens=chunk), prompts(reference)), reference)


def test_after_preemption(checkpoint: Path, reference: Any):
    """Recomputing keeps the first alpha: with a fresh one 100 + 64 tokens at seq_length 128 would differ."""
    per_token = 2 * 4 * 256 * 4
    core = start(checkpoint, block_size=16, kv_cache_memory_bytes=per_token * 16 * 38, enable_prefix_caching=False)
    check(greedy(core, prompts(reference)), reference)
    assert core.scheduler.num_preemptions > 0


def test_with_a_warm_prefix_cache(checkpoint: Path, reference: Any):
    core = start(checkpoint, block_size=16)
    check(greedy(core, prompts(reference)), reference)
    assert core.scheduler.num_prefix_hits == 0
    check(greedy(core, prompts(reference)), reference)
    assert core.scheduler.num_prefix_hits == 96 + 128 + 288


def test_blocks_are_shared_only_at_equal_alpha(checkpoint: Path, reference: Any):
    """A prompt of 300 begins with one of 100, but its keys are rotated by another alpha."""
    long = reference["prompt_300"].tolist()
    core = start(checkpoint, block_size=16)
    greedy(core, [long[:100]], 4)
    greedy(core, [long], 4)
    assert core.scheduler.num_prefix_hits == 0
    greedy(core, [long[:290]], 4)
    assert core.scheduler.num_prefix_hits == 288


def test_through_the_python_interface(checkpoint: Path, reference: Any):
    llm = LLM(str(checkpoint), dtype="float32", skip_tokenizer_init=True)
    params = SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts(reference)], params, use_tqdm=False)
    check([output.outputs[0].token_ids for output in outputs], reference)

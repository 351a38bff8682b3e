"""Weights that wait in host memory while their engine sleeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fastqwen import LLM, SamplingParams
from fastqwen.kernels.cpu.ops import CpuOps
from fastqwen.runner import held, start
from fastqwen.runner.held import HeldWeights, tensors_of
from tests.models.tiny import make, prompt

GREEDY = SamplingParams(temperature=0, ignore_eos=True, max_tokens=6)


def load(folder: Path, **options: Any) -> LLM:
    make(folder, "Qwen3Config", head_dim=16, num_hidden_layers=2)
    return LLM(str(folder), skip_tokenizer_init=True, **options)


def said(llm: LLM) -> list[int]:
    return list(llm.generate(prompt(9), GREEDY, use_tqdm=False)[0].outputs[0].token_ids)


def bytes_behind(weights: HeldWeights) -> int:
    storages = [one.untyped_storage() for one in tensors_of(weights.decoder)]
    return sum(one.nbytes() for one in storages if one.resizable())


def test_the_memory_behind_all_weights_goes_and_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What a device holds is told by a switch here, so that the same is done to this host's memory, weights in their own."""
    monkeypatch.setattr(CpuOps, "settled", lambda self, weight: weight)
    llm = load(tmp_path, dtype="float32")
    weights = llm._loaded._weights
    assert weights is not None
    monkeypatch.setattr(held, "is_on_a_device", lambda storage: storage.resizable())
    wanted, whole = said(llm), bytes_behind(weights)
    assert whole > 0
    llm.sleep(level=1)
    assert bytes_behind(weights) == 0 and llm.is_sleeping()
    monkeypatch.setattr(start, "_load", None)  # nothing is read again
    llm.wake_up(tags=["weights"])
    assert bytes_behind(weights) == whole and said(llm) == wanted


def test_what_is_to_be_dropped_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    llm = load(tmp_path, dtype="float32")
    wanted, loads, own = said(llm), [], start._load

    def counted(*arguments: Any) -> HeldWeights:
        loads.append(1)
        return own(*arguments)

    monkeypatch.setattr(start, "_load", counted)
    for levels, count in (((1,), 0), ((2,), 1), ((1, 2), 2)):  # asleep already, it may be dropped as well
        for level in levels:
            llm.sleep(level=level)
        llm.wake_up()
        assert len(loads) == count and said(llm) == wanted


def test_tensors_are_found_wherever_ours_hold_them():
    one, other = torch.zeros(2), torch.ones(3)
    found = tensors_of({"a": [one, (other, one)], "b": lambda: torch.zeros(1)})
    assert {id(tensor) for tensor in found} == {id(one), id(other)}


@pytest.mark.gpu
def test_a_gpu_is_given_back_and_taken_again(tmp_path: Path):
    llm = load(tmp_path, dtype="bfloat16")
    wanted = said(llm)
    before = torch.cuda.memory_allocated()
    llm.sleep(level=1)
    assert torch.cuda.memory_allocated() < before // 4
    llm.wake_up()
    assert said(llm) == wanted

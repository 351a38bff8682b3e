"""The GPU's executor against the CPU's: the same tokens, launched kernel by kernel and from recordings.

Without a GPU the kernels run in Triton's interpreter, and a recording is a function that is called again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import tests.kernels.test_triton as setup
from fastqwen.build import build_decoder
from fastqwen.config import EngineConfig
from fastqwen.engine.blocks import BlockPool
from fastqwen.engine.core import EngineCore
from fastqwen.engine.policy import StepPolicy
from fastqwen.engine.scheduler import Scheduler
from fastqwen.engine.snapshots import SnapshotPool
from fastqwen.kernels.triton.ops import TritonOps
from fastqwen.kernels.triton.sampling import TOLD_WORDS
from fastqwen.layers.rotary_key import rope_key
from fastqwen.plan import make_plan
from fastqwen.runner.cuda_runner import CudaRunner
from fastqwen.runner.device import device_facts
from fastqwen.runner.recording import Recording
from fastqwen.runner.step_layout import StepLayout
from fastqwen.weights.checkpoint import open_checkpoint
from fastqwen.weights.source import Weights
from tests.models.tiny import MOE, greedy, make, make_qwen1, prompt, start

DEVICE = torch.device(setup.DEVICE)
WISHES = {"max_num_seqs": 3, "max_model_len": 256, "kv_cache_memory_bytes": 2**22}


class Event:
    def record(self) -> None: ...
    def synchronize(self) -> None: ...


class Replay:
    """Stands for a CUDA graph where there is none."""

    def __init__(self, runner: CudaRunner, layout: StepLayout, outputs: tuple[torch.Tensor, ...]) -> None:
        self.runner, self.layout, self.outputs, self.count = runner, layout, outputs, 0

    def replay(self) -> None:
        self.count += 1
        for kept, found in zip(self.outputs, self.runner._recorded_step(self.layout), strict=True):
            kept.copy_(found)


@pytest.fixture(autouse=True)
def without_cuda(monkeypatch: pytest.MonkeyPatch):
    if DEVICE.type == "cpu":
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
        monkeypatch.setattr(torch.cuda, "Event", Event)


def gpu_core(folder: Path, *, recorded: bool, **wishes: Any) -> tuple[EngineCore, CudaRunner]:
    config = EngineConfig(model=str(folder), **{"dtype": "float32", **WISHES, **wishes})
    checkpoint = open_checkpoint(folder, with_tensors=True)
    model = checkpoint.model
    plan = make_plan(model, config, device_facts(torch.device("cpu")))
    decoder = build_decoder(
        model,
        Weights(checkpoint.tensors, torch.float32, DEVICE),
        TritonOps(DEVICE),
        source="",
        progress=lambda *_: None,
    )
    runner = CudaRunner(model, decoder, plan, DEVICE)
    if recorded and DEVICE.type == "cuda":
        runner.capture()
    elif recorded:
        decode, prompts = runner._layouts()
        runner._decode_steps = [recording(runner, layout) for layout in decode]
        runner._prompt_steps = [recording(runner, layout) for layout in prompts]
    scheduler = Scheduler(
        BlockPool(plan.num_blocks, plan.block_size),
        StepPolicy(max_num_batched_tokens=plan.max_num_batched_tokens),
        max_num_seqs=plan.max_num_seqs,
        enable_prefix_caching=config.enable_prefix_caching,
        rope_key_of=lambda length, limit: rope_key(model.rope, length, limit),
        snapshots=SnapshotPool(plan.max_state_snapshots, plan.block_size) if model.delta is not None else None,
    )
    return EngineCore(scheduler, runner), runner


def recording(runner: CudaRunner, layout: StepLayout) -> Any:
    model, rows = runner._model, layout.samples
    outputs = (
        torch.zeros(layout.tokens, model.hidden_size),
        torch.zeros(rows, model.vocab_size),
        torch.zeros(rows, dtype=torch.int32),
        torch.zeros(rows, TOLD_WORDS, dtype=torch.int32),
    )
    return Recording(layout, Replay(runner, layout, outputs), *outputs)  # type: ignore[arg-type]


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("kind", ["qwen3", "qwen3-moe", "qwen1"])
def test_the_same_tokens_as_on_the_cpu(tmp_path: Path, kind: str, recorded: bool):
    """Prompts that come in chunks beside running streams, more of them than there are slots."""
    if kind == "qwen1":
        make_qwen1(tmp_path, num_attention_heads=2, kv_channels=32)
    else:
        changes = {**MOE, "norm_topk_prob": True} if kind == "qwen3-moe" else {}
        make(tmp_path, "Qwen3MoeConfig" if changes else "Qwen3Config", head_dim=32, num_hidden_layers=1, **changes)
    prompts = [prompt(length) for length in (1, 23, 40, 5)]
    expected = greedy(start(tmp_path, max_num_batched_tokens=32, **WISHES), prompts, max_tokens=3)
    core, runner = gpu_core(tmp_path, recorded=recorded, max_num_batched_tokens=32)
    assert greedy(core, prompts, max_tokens=3) == expected
    if recorded and DEVICE.type == "cpu":
        assert sum(one.graph.count for one in runner._prompt_steps) > 2
        assert sum(one.graph.count for one in runner._decode_steps) > 2


@pytest.mark.slow
@pytest.mark.parametrize("recorded", [False, True])
def test_states_of_fixed_size_in_place(tmp_path: Path, recorded: bool):
    """In slots that others had, behind chunks, in padded steps, and from copies that the prefix cache kept."""
    heads = {"linear_num_key_heads": 1, "linear_num_value_heads": 2}
    sizes = {"head_dim": 32, "linear_key_head_dim": 16, "linear_value_head_dim": 16}
    kinds = ["linear_attention", "full_attention"]
    make(tmp_path, "Qwen3_5TextConfig", num_hidden_layers=2, layer_types=kinds, **heads, **sizes)
    prompts = [prompt(length) for length in (1, 40, 2, 5)]
    expected = greedy(start(tmp_path, max_num_batched_tokens=32, **WISHES), prompts, max_tokens=3)
    core, runner = gpu_core(tmp_path, recorded=recorded, max_num_batched_tokens=32)
    assert greedy(core, prompts, max_tokens=3) == expected
    assert greedy(core, prompts[1:2], max_tokens=3) == expected[1:2]
    assert core.scheduler.num_prefix_hits == 32
    if recorded and DEVICE.type == "cpu":
        assert sum(one.graph.count for one in runner._prompt_steps) > 2
        assert sum(one.graph.count for one in runner._decode_steps) > 2


def test_parts_of_prompts_ask_for_nothing_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Greedy requests are sampled by the recorded step alone, also while a prompt beside them is not yet complete."""
    make(tmp_path, "Qwen3Config", head_dim=32, num_hidden_layers=1)
    core, runner = gpu_core(tmp_path, recorded=True, max_num_batched_tokens=32)
    calls = 0

    def counted(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        return special(*arguments)

    special = runner._choose_again
    monkeypatch.setattr(runner, "_choose_again", counted)
    prompts = [prompt(40), prompt(5), prompt(70)]
    found = greedy(core, prompts, max_tokens=3)
    assert calls == 0
    expected = greedy(start(tmp_path, max_num_batched_tokens=32, **WISHES), prompts, max_tokens=3)
    assert found == expected

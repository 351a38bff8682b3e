"""Tiny random-weight checkpoints, and what fastqwen computes with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from fastqwen.config import EngineConfig
from fastqwen.engine.core import EngineCore
from fastqwen.records import Admission, EngineRequest, Row, SamplingParams
from fastqwen.runner.packing import pack
from fastqwen.runner.start import start_engine

COMMON = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,  # large enough that logits have clear winners
    "attn_implementation": "eager",
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
MOE = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 48}


def make(folder: Path, config_class: str, *, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A transformers model with random weights, saved into ``folder``; norms and biases are random as well."""
    torch.manual_seed(20261123)
    config = getattr(transformers, config_class)(**{**COMMON, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith(".bias"):
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.generation_config = transformers.GenerationConfig(do_sample=False)
    model.save_pretrained(folder)
    return model


def prompt(length: int, vocab: int = 256, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed + length)
    return torch.randint(0, vocab, (length,), generator=generator).tolist()


def start(folder: Path, **wishes: Any) -> EngineCore:
    return start_engine(EngineConfig(model=str(folder), **{"dtype": "float32", **wishes}), folder).core


def logits(folder: Path, ids: list[int], **wishes: Any) -> torch.Tensor:
    """float32 [tokens, vocab] of one whole prompt, through the paged path."""
    runner: Any = start(folder, **wishes)._executor
    size = runner._plan.block_size
    blocks = list(range(-(-len(ids) // size)))
    admission = Admission(
        slot=0,
        request_id="x",
        token_ids=ids,
        num_prompt_tokens=len(ids),
        sampling=SamplingParams(),
        seed=0,
        stop_token_ids=[],
        rope_key="",
    )
    row = Row(slot=0, request_id="x", start=0, num_tokens=len(ids), new_blocks=blocks, samples=False)
    with torch.inference_mode():
        runner.slots.admit([admission])
        runner.slots.extend([row])
        flat, where = pack([row], runner.slots, block_size=size, logn_len=runner._model.logn_len)
        return runner._decoder.logits(runner._decoder.hidden(flat, where, runner.caches)).float()


def greedy(core: EngineCore, prompts: list[list[int]], max_tokens: int = 64) -> list[list[int]]:
    """Greedy tokens of all prompts in one engine at once; the engine is empty and audited afterwards."""
    for index, ids in enumerate(prompts):
        core.add(
            EngineRequest(
                request_id=str(index),
                prompt_token_ids=ids,
                sampling=SamplingParams(temperature=0.0),
                stop_token_ids=[],
                max_tokens=max_tokens,
                seed=0,
            )
        )
    found: list[list[int]] = [[] for _ in prompts]
    while core.has_work:
        for delta in core.step():
            assert delta.finish_reason in (None, "length"), delta
            found[int(delta.request_id)] += delta.token_ids
    core.step()
    return found

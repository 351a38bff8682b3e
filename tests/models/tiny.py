"""Tiny random-weight checkpoints, and what fastqwen computes with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

from fastqwen.config import EngineConfig
from fastqwen.engine.core import EngineCore
from fastqwen.records import Admission, EngineRequest, Row, SamplingParams
from fastqwen.runner.model_runner import ModelRunner
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


def make(
    folder: Path, config_class: str, *, dtype: torch.dtype = torch.float32, slow_fading: bool = True, **changes: Any
) -> Any:
    """A transformers model with random weights, saved into ``folder``; norms and biases are random as well.
    ``slow_fading``: memories of a gated delta rule last for some tokens; as transformers draws them, most fade at once."""
    torch.manual_seed(20261123)
    config = getattr(transformers, config_class)(**{**COMMON, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith(".bias"):
                parameter.add_(0.2 * torch.randn_like(parameter))
            if slow_fading and name.endswith("A_log"):
                parameter.copy_(torch.randn_like(parameter) - 3.0)
            parameter.data = parameter.to(
                dtype
            )  # not model.to(dtype), which would round the rotary frequencies as well
    model.generation_config = transformers.GenerationConfig(do_sample=False)
    model.save_pretrained(folder)
    return model


def make_qwen1(folder: Path, **changes: Any) -> None:
    """Qwen-1 under its own names: 2 layers, 4 heads of 16, seq_length 64 with dynamic NTK and logN."""
    config = {
        "architectures": ["QWenLMHeadModel"], "model_type": "qwen", "hidden_size": 64, "intermediate_size": 192,
        "kv_channels": 16, "layer_norm_epsilon": 1e-6, "max_position_embeddings": 512, "no_bias": True,
        "num_attention_heads": 4, "num_hidden_layers": 2, "rotary_emb_base": 10000, "rotary_pct": 1.0,
        "seq_length": 64, "tie_word_embeddings": False, "use_dynamic_ntk": True, "use_logn_attn": True,
        "vocab_size": 256, "torch_dtype": "float32", **changes,
    }  # fmt: skip
    generator = torch.Generator().manual_seed(7)

    def tensor(*shape: int) -> torch.Tensor:
        return 0.2 * torch.randn(shape, generator=generator)

    vocab = config["vocab_size"]
    tensors = {"transformer.wte.weight": tensor(vocab, 64), "lm_head.weight": tensor(vocab, 64)}
    tensors["transformer.ln_f.weight"] = 1 + tensor(64)
    for layer in range(2):
        prefix = f"transformer.h.{layer}."
        tensors[f"{prefix}ln_1.weight"], tensors[f"{prefix}ln_2.weight"] = 1 + tensor(64), 1 + tensor(64)
        tensors[f"{prefix}attn.c_attn.weight"], tensors[f"{prefix}attn.c_attn.bias"] = tensor(192, 64), tensor(192)
        tensors[f"{prefix}attn.c_proj.weight"] = tensor(64, 64)
        tensors[f"{prefix}mlp.w1.weight"], tensors[f"{prefix}mlp.w2.weight"] = tensor(96, 64), tensor(96, 64)
        tensors[f"{prefix}mlp.c_proj.weight"] = tensor(64, 96)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")


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
    row = Row(slot=0, request_id="x", start=0, num_tokens=len(ids), new_blocks=tuple(blocks), num_logits=0)
    with torch.inference_mode():
        runner.slots.update([admission], [row])
        return runner._decoder.logits(hidden_of(runner, row)).float().cpu()


def hidden_of(runner: Any, row: Row) -> torch.Tensor:
    """[tokens, hidden] of a step with this one row, on whichever device."""
    if isinstance(runner, ModelRunner) and type(runner) is not ModelRunner:  # the GPU's lays its steps out by itself
        return runner._launch([row])[0][: row.num_tokens]
    flat, where = pack([row], runner.slots, logn_len=runner._model.logn_len)
    return runner._decoder.hidden(flat, where, runner.states.layers)


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

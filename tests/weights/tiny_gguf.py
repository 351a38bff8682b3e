"""Tiny models as GGUF: metadata, tensors under the GGUF's names, and what they are called in Hugging Face checkpoints."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.weights.gguf_writer import Packed, random_tensor, write_gguf

HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, INTER, VOCAB = 64, 2, 4, 2, 16, 96, 40
EXPERTS, EXPERT_SIZE, SHARED_SIZE = 4, 32, 64


@dataclass
class TinyGguf:
    architecture: str
    type_name: str = "F32"
    metadata: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Packed] = field(default_factory=dict)
    hf_names: dict[str, str] = field(default_factory=dict)  # GGUF name to Hugging Face name

    def add(self, gguf_name: str, hf_name: str, *shape: int) -> None:
        kind = self.type_name if len(shape) > 1 else "F32"
        self.tensors[gguf_name] = random_tensor(kind, shape, seed=len(self.tensors))
        self.hf_names[gguf_name] = hf_name

    def write(self, path: Path) -> Path:
        return write_gguf(path, self.metadata, self.tensors)

    def values(self, gguf_name: str) -> torch.Tensor:
        """Of an F32 tensor."""
        tensor = self.tensors[gguf_name]
        assert tensor.type_name == "F32"
        return torch.from_numpy(np.frombuffer(tensor.data, "<f4").reshape(tensor.shape).copy())


def tiny(architecture: str, type_name: str = "F32", *, tied: bool = False) -> TinyGguf:
    model = TinyGguf(architecture, type_name)
    model.metadata = metadata(architecture)
    model.add("token_embd.weight", "model.embed_tokens.weight", VOCAB, HIDDEN)
    model.add("output_norm.weight", "model.norm.weight", HIDDEN)
    if not tied:
        model.add("output.weight", "lm_head.weight", VOCAB, HIDDEN)
    for layer in range(LAYERS):
        attention(model, f"blk.{layer}.", f"model.layers.{layer}.")
        if architecture.endswith("moe"):
            experts(model, f"blk.{layer}.", f"model.layers.{layer}.mlp.")
        else:
            mlp(model, f"blk.{layer}.ffn_{{}}.weight", f"model.layers.{layer}.mlp.{{}}_proj.weight", INTER)
    return model


def metadata(architecture: str) -> dict[str, Any]:
    sizes: dict[str, Any] = {
        "block_count": LAYERS,
        "context_length": 512,
        "embedding_length": HIDDEN,
        "feed_forward_length": INTER,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 50000.0,
    }
    if architecture.endswith("moe"):
        sizes |= {"expert_count": EXPERTS, "expert_used_count": 2}
    ids = {f"tokenizer.ggml.{name}": value for name, value in {"eos_token_id": 3, "bos_token_id": 1}.items()}
    return {"general.architecture": architecture, **{f"{architecture}.{k}": v for k, v in sizes.items()}, **ids}


def attention(model: TinyGguf, gguf: str, hf: str) -> None:
    model.add(f"{gguf}attn_norm.weight", f"{hf}input_layernorm.weight", HIDDEN)
    model.add(f"{gguf}ffn_norm.weight", f"{hf}post_attention_layernorm.weight", HIDDEN)
    for letter, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
        model.add(f"{gguf}attn_{letter}.weight", f"{hf}self_attn.{letter}_proj.weight", heads * HEAD_DIM, HIDDEN)
        if model.architecture.startswith("qwen2"):
            model.add(f"{gguf}attn_{letter}.bias", f"{hf}self_attn.{letter}_proj.bias", heads * HEAD_DIM)
        if model.architecture.startswith("qwen3") and letter != "v":
            model.add(f"{gguf}attn_{letter}_norm.weight", f"{hf}self_attn.{letter}_norm.weight", HEAD_DIM)
    model.add(f"{gguf}attn_output.weight", f"{hf}self_attn.o_proj.weight", HIDDEN, HEADS * HEAD_DIM)


def mlp(model: TinyGguf, gguf: str, hf: str, size: int) -> None:
    model.add(gguf.format("gate"), hf.format("gate"), size, HIDDEN)
    model.add(gguf.format("up"), hf.format("up"), size, HIDDEN)
    model.add(gguf.format("down"), hf.format("down"), HIDDEN, size)


def experts(model: TinyGguf, gguf: str, hf: str) -> None:
    model.add(f"{gguf}ffn_gate_inp.weight", f"{hf}gate.weight", EXPERTS, HIDDEN)
    for part, shape in {
        "gate": (EXPERT_SIZE, HIDDEN),
        "up": (EXPERT_SIZE, HIDDEN),
        "down": (HIDDEN, EXPERT_SIZE),
    }.items():
        model.add(f"{gguf}ffn_{part}_exps.weight", f"{hf}experts.{{expert}}.{part}_proj.weight", EXPERTS, *shape)
    if model.architecture == "qwen2moe":
        mlp(model, f"{gguf}ffn_{{}}_shexp.weight", f"{hf}shared_expert.{{}}_proj.weight", SHARED_SIZE)
        model.add(f"{gguf}ffn_gate_inp_shexp.weight", f"{hf}shared_expert_gate.weight", HIDDEN)

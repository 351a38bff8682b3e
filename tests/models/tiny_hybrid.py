"""A tiny hybrid that is written down here, for machines without transformers; its heads have the published sizes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file


def write_tiny(folder: Path, *, sparse: bool) -> Path:
    """A random checkpoint whose heads have the published sizes: 4 layers, the last one with attention."""
    config = {
        "architectures": ["Qwen3_5MoeForCausalLM" if sparse else "Qwen3_5ForCausalLM"],
        "model_type": "qwen3_5_moe_text" if sparse else "qwen3_5_text", "vocab_size": 512, "hidden_size": 256,
        "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 256,
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "hidden_act": "silu",
        "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_num_key_heads": 2,
        "linear_num_value_heads": 4, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64, "num_experts": 8,
        "num_experts_per_tok": 2, "dtype": "float32",
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25},
    }  # fmt: skip
    if not sparse:
        config = {key: value for key, value in config.items() if "expert" not in key and "moe_i" not in key}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tiny_tensors(sparse=sparse), folder / "model.safetensors")
    return folder


def tiny_tensors(*, sparse: bool) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(11)

    def tensor(*shape: int, size: float | None = None, middle: float = 0.0) -> torch.Tensor:
        return middle + torch.randn(shape, generator=generator) * (shape[-1] ** -0.5 if size is None else size)

    found = {"model.embed_tokens.weight": tensor(512, 256, size=1.0), "lm_head.weight": tensor(512, 256, size=0.15),
             "model.norm.weight": tensor(256, size=0.2)}  # fmt: skip
    for layer in range(4):
        at = f"model.layers.{layer}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            found[f"{at}{norm}.weight"] = tensor(256, size=0.2)
        if layer == 3:
            shapes = {"q_proj": (2048, 256), "k_proj": (512, 256), "v_proj": (512, 256), "o_proj": (256, 1024)}
            found |= {f"{at}self_attn.{name}.weight": tensor(*shape) for name, shape in shapes.items()}
            found |= {f"{at}self_attn.{name}_norm.weight": tensor(256, size=0.2) for name in "qk"}
        else:
            shapes = {"in_proj_qkv": (1024, 256), "in_proj_z": (512, 256), "in_proj_b": (4, 256), "in_proj_a": (4, 256),
                      "out_proj": (256, 512)}  # fmt: skip
            found |= {f"{at}linear_attn.{name}.weight": tensor(*shape) for name, shape in shapes.items()}
            found[f"{at}linear_attn.conv1d.weight"] = tensor(1024, 1, 4, size=0.5)
            found[f"{at}linear_attn.A_log"] = tensor(4, size=1.5, middle=-3.0)
            found[f"{at}linear_attn.dt_bias"] = tensor(4, size=0.7, middle=0.5)
            found[f"{at}linear_attn.norm.weight"] = tensor(128, size=0.2, middle=1.0)
        found |= _tiny_feed_forward(f"{at}mlp.", tensor, sparse=sparse)
    return found


def _tiny_feed_forward(at: str, tensor: Callable[..., torch.Tensor], *, sparse: bool) -> dict[str, torch.Tensor]:
    parts = [(at, 384)]
    found = {}
    if sparse:
        parts = [(f"{at}shared_expert.", 64), *((f"{at}experts.{expert}.", 64) for expert in range(8))]
        found = {f"{at}gate.weight": tensor(8, 256), f"{at}shared_expert_gate.weight": tensor(1, 256)}
    for prefix, size in parts:
        found |= {f"{prefix}{name}_proj.weight": tensor(size, 256) for name in ("gate", "up")}
        found[f"{prefix}down_proj.weight"] = tensor(256, size)
    return found

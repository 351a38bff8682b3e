"""Qwen, first generation (QWenLMHeadModel): fused c_attn with a bias, SiLU on w2, dynamic NTK and logN by request.

Reads both generations of config keys; the first 7B release of August 2023 used GPT-2's names.
"""

from __future__ import annotations

from fastqwen.common_config import checkpoint_facts
from fastqwen.errors import BadCheckpoint
from fastqwen.model_config import Fields, ModelConfig, RopeConfig
from fastqwen.models.names import Names

NAMES = Names(
    embed="transformer.wte",
    final_norm="transformer.ln_f",
    layer="transformer.h.{layer}.",
    attention_norm="ln_1",
    qkv=("attn.c_attn",),
    o="attn.c_proj",
    mlp_norm="ln_2",
    gate_up=("mlp.w2", "mlp.w1"),
    down="mlp.c_proj",
)


def parse(fields: Fields) -> ModelConfig:
    fields.require("rotary_pct", (1.0,))
    fields.require("no_bias", (True,))
    num_heads = fields.int("num_attention_heads", "n_head", high=4096)
    hidden_size = fields.int("hidden_size", "n_embd", high=2**20)
    head_dim = fields.int("kv_channels", default=max(1, hidden_size // num_heads), high=1024)
    if num_heads * head_dim != hidden_size:
        raise BadCheckpoint(
            f"{fields.source}: num_attention_heads ({num_heads}) x kv_channels ({head_dim}) is not hidden_size ({hidden_size})"
        )
    max_position_embeddings = fields.int("max_position_embeddings", "n_positions", default=8192)
    seq_length = fields.int("seq_length", default=max_position_embeddings, low=2)
    ntk = fields.flag("use_dynamic_ntk")
    double_size = fields.int("intermediate_size", "ffn_hidden_size", high=2**22)
    if double_size % 2 or head_dim % 2:
        raise BadCheckpoint(
            f"{fields.source}: intermediate_size ({double_size}) and kv_channels ({head_dim}) must be even"
        )
    return ModelConfig(
        model_type="qwen",
        vocab_size=fields.int("vocab_size", "padded_vocab_size", high=2**24),
        hidden_size=hidden_size,
        num_layers=fields.int("num_hidden_layers", "n_layer", high=4096),
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=head_dim,
        intermediate_size=double_size // 2,
        rms_norm_eps=fields.float("layer_norm_epsilon", default=1e-6),
        tie_word_embeddings=fields.flag("tie_word_embeddings"),
        max_position_embeddings=max(max_position_embeddings, seq_length) if ntk else max_position_embeddings,
        rope=RopeConfig(
            theta=fields.float("rotary_emb_base", default=10000.0, positive=True),
            kind="qwen1_ntk" if ntk else "default",
            trained_len=seq_length,
        ),
        qkv_bias=True,
        logn_len=seq_length if fields.flag("use_logn_attn") else None,
        **checkpoint_facts(fields),
    )

"""The keys of a config.json that nobody here reads: which of them change nothing, and which would change the answers.

A key is read, or says nothing about what is computed, or is refused by its name, or is named in a line. The keys of
every Qwen and Llama in transformers are sorted here by tests/models/test_config_keys.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastqwen.errors import Unsupported
from fastqwen.model_config import Fields, ModelConfig, short

# Where a file came from, how it was trained, and how another program is to run it.
SILENT = frozenset((
    "_attn_implementation", "_attn_implementation_autoset", "_attn_implementation_internal", "_commit_hash",
    "_experts_implementation_internal", "_flash_attn_2_enabled", "_name_or_path", "add_cross_attention",
    "architectures", "attention_dropout", "attn_dropout_prob", "attn_implementation", "attn_pdrop", "auto_map",
    "bf16", "cache_implementation", "chunk_size_feed_forward", "cls_token_id", "custom_pipelines",
    "decoder_start_token_id", "dropout", "dtype", "emb_dropout_prob", "embd_pdrop", "experts_implementation",
    "finetuned_from", "finetuning_task", "fp16", "fp32", "gradient_checkpointing", "hidden_dropout", "id2label",
    "initializer_range", "is_decoder", "is_encoder_decoder", "is_llama_config", "keys_to_ignore_at_inference",
    "label2id", "lambda_std_dev", "lora_alpha", "mamba_ssm_dtype", "mask_token_id", "model_max_length", "model_type",
    "mtp_layer_types", "mtp_num_hidden_layers", "mtp_use_dedicated_embeddings", "name_or_path", "num_labels",
    "num_nextn_predict_layers", "onnx_safe", "output_attentions", "output_hidden_states", "output_router_logits",
    "pad_token_id", "pretraining_tp", "problem_type", "resid_pdrop", "return_dict", "return_dict_in_generate",
    "router_aux_loss_coef", "router_jitter_noise", "seed", "sep_token_id", "softmax_in_fp32",
    "task_specific_params", "tie_encoder_decoder", "tie_last_hidden_states", "tokenizer_class", "torch_dtype",
    "torchscript", "transformers.js_config", "transformers_version", "unk_token_id", "unsloth_fixed",
    "unsloth_version", "use_bfloat16", "use_cache", "use_cache_kernel", "use_cache_quantization",
    "use_flash_attention_2", "use_flash_attn", "use_return_dict",
))  # fmt: skip

# What no model file here computes, with the values that mean it is not there. null always means that.
OFF: tuple[Any, ...] = (False, 0)
ONE: tuple[Any, ...] = (1, True)
NEUTRAL: dict[str, tuple[Any, ...]] = {
    # position
    "partial_rotary_factor": ONE, "rotary_percent": ONE, "rotary_pct": ONE, "rope_percent": ONE, "rope_pct": ONE,
    "rope_interleaved": OFF, "rope_interleave": OFF, "rope_ratio": ONE, "no_rope_layer_interval": OFF,
    "alibi": OFF, "use_alibi": OFF, "alibi_bias_max": OFF, "use_mrope": OFF, "mrope_section": ([],),
    "mrope_interleaved": OFF, "use_rope": ONE, "use_rotary_embedding": ONE, "use_rotary_embeddings": ONE,
    "use_dynamic_ntk": OFF, "use_logn_attn": OFF, "rope_local_base_freq": (), "nope_layers": ([],),
    "position_embedding_type": ("rope", "rotary", "absolute"), "global_rope_theta": (), "local_rope_theta": (),
    "swa_rope_theta": (), "layer_rope_theta": (),
    # attention
    "attn_logit_softcapping": OFF, "attention_logit_softcapping": OFF, "attn_logit_softcap": OFF,
    "attn_soft_cap": OFF, "clip_qkv": OFF, "clamp_kqv": OFF, "attn_output_gate": OFF, "attention_output_gate": OFF,
    "use_output_gate": OFF, "gated_attention": OFF, "attn_temperature_tuning": OFF, "attn_scale": OFF,
    "floor_scale": OFF, "scale_attn_weights": ONE, "attention_chunk_size": OFF, "attention_window_size": OFF, "window_size": OFF,
    "sliding_window_pattern": OFF, "full_attention_interval": ONE, "is_causal": ONE, "causal": ONE,
    "use_bidirectional_attention": OFF, "bidirectional": OFF, "attention_sinks": OFF, "use_attention_sinks": OFF,
    "use_sinks": OFF, "sink_token_num": OFF, "parallel_attn": OFF, "use_parallel_residual": OFF,
    "multi_query": OFF, "kv_lora_rank": OFF, "q_lora_rank": OFF, "qk_rope_head_dim": (), "qk_nope_head_dim": (),
    "num_kv_shared_layers": OFF, "cross_attention_layers": ([],), "use_qkv_norm": OFF, "qk_layernorm": OFF,
    "use_qk_l2_norm": OFF, "v_norm": OFF, "use_v_norm": OFF, "k_eq_v": OFF, "attention_k_eq_v": OFF,
    "qk_norm_type": ("rms", "rmsnorm"),
    # layers that are of another kind
    "linear_attention": OFF, "linear_conv_kernel_dim": (), "linear_key_head_dim": (), "linear_num_key_heads": (),
    "linear_num_value_heads": (), "linear_value_head_dim": (), "output_gate_type": (), "block_configs": ([],),
    "per_layer_config": ({},), "layer_config": ({},), "hybrid_layer_pattern": ([],), "mlp_layer_types": (),
    "pruned_heads": ({}, []), "skip_layers": ([],), "num_hash_layers": OFF, "hc_count": OFF, "hc_lowrank": OFF,
    "ngram_size": OFF, "ngram_vocab_size_base": (), "heads_per_ngram": (), "split_ngram_parts": (),
    "make_ngram_vocab_size_divisible_by": (), "ple_conv_kernel_size": (), "ple_embed_dim": OFF, "ple_layer_ids": ([],),
    "indexer_budget": (), "indexer_compress_ratio": (), "indexer_head_dim": (), "indexer_kv_heads": (),
    "indexer_n_heads": (), "index_topk": OFF, "index_head_dim": (), "index_n_heads": (),
    # scales and limits on the way through
    "logit_scale": ONE, "logits_scaling": ONE, "logit_scaling": ONE, "output_multiplier_scale": ONE,
    "output_multiplier": ONE, "lm_head_multiplier": ONE, "width_multiplier": ONE, "final_logit_softcapping": OFF,
    "final_logit_softcap": OFF, "logits_soft_cap": OFF, "output_logit_soft_cap": OFF, "logit_softcap": OFF,
    "embedding_multiplier": ONE, "embedding_scale": ONE, "scale_embedding": OFF, "scale_emb": ONE, "embed_scale": ONE,
    "embedding_multiplier_scale": ONE, "embeddings_multiplier": ONE, "input_embedding_scale": ONE,
    "residual_multiplier": ONE, "residual_scale": ONE, "scale_depth": ONE, "dim_model_base": (), "mup_width_multiplier": ONE,
    "use_mup": OFF, "mup_enabled": OFF, "normalize_embedding": OFF, "attention_out_multiplier": ONE,
    "attention_in_multiplier": ONE, "key_multiplier": ONE, "mlp_multipliers": (), "layer_scale_initial_scale": (),
    # norms and the feed-forward part
    "rms_norm_unit_offset": OFF, "norm_add_unit_offset": OFF, "layernorm_zero_centered_gamma": OFF,
    "zero_centered_gamma": OFF, "apply_layernorm_1p": OFF, "use_layernorm": OFF, "norm_type": ("rmsnorm", "rms_norm", "rms"),
    "post_norm": OFF, "use_post_norm": OFF, "pre_norm": ONE, "sandwich_norm": OFF, "norm_after": OFF,
    "apply_residual_connection_post_layernorm": OFF, "hidden_activation": ("silu", "swish"),
    "activation_function": ("silu", "swish"), "use_gated_mlp": ONE, "mlp_hidden_size": (), "swiglu_limit": OFF,
    "activation_limit": OFF,
    # experts
    "n_shared_experts": OFF, "num_shared_experts": OFF, "shared_expert_intermediate_size": OFF,
    "moe_shared_expert_intermediate_size": OFF, "shared_intermediate_size": OFF, "use_shared_expert": OFF,
    "num_shared_expert": OFF, "n_routed_experts": OFF, "routed_scaling_factor": ONE, "router_scaling_factor": ONE,
    "moe_router_topk_scaling_factor": ONE, "n_group": ONE, "num_expert_group": ONE, "topk_group": ONE,
    "topk_method": ("greedy",), "scoring_func": ("softmax",), "moe_router_score_function": ("softmax",),
    "score_function": ("softmax",), "moe_router_enable_expert_bias": OFF, "use_routing_bias": OFF,
    "router_bias": OFF, "first_k_dense_replace": OFF, "moe_layer_freq": ONE, "moe_layers": ([],),
    "interleave_moe_layer_step": OFF, "moe_layer_interval": ONE, "moe_layer_start_index": OFF,
    "intermediate_size_mlp": OFF, "zero_expert_num": OFF, "moe_apply_router_weight_on_input": OFF,
    # weights that are stored in another way
    "compression_config": (), "sparsity_config": (), "adapter_config": (), "expert_pruning": OFF,
}  # fmt: skip

# Neutral is what this model is anyway.
SAME_AS: dict[str, Callable[[ModelConfig], Any]] = {
    "use_qk_norm": lambda model: model.qk_norm,
    "qk_norm": lambda model: model.qk_norm,
    "query_pre_attn_scalar": lambda model: model.head_dim,
    "attention_multiplier": lambda model: model.head_dim**-0.5,
    "rotary_dim": lambda model: model.rotary_dim,
    "rotary_ndims": lambda model: model.rotary_dim,
    "v_head_dim": lambda model: model.head_dim,
    "value_head_dim": lambda model: model.head_dim,
}
LISTS_OF_ONES = ("no_rope_layers",)  # an entry for each layer; 1 means that it does rotate, as layers here do
MAX_NAMED = 12


def account(fields: Fields, model: ModelConfig) -> list[str]:
    """What is to be told of the keys that were not read, at most one line. Raises Unsupported for one that would change
    what is computed."""
    named = []
    for key in sorted(fields.values.keys() - fields.seen - SILENT):
        value = fields.values[key]
        if value is None or _is_neutral(key, value, model):
            continue
        if key in NEUTRAL or key in SAME_AS or key in LISTS_OF_ONES:
            raise Unsupported(
                f"{fields.source}: {key} is {short(value)}, which a {model.model_type} here does not compute"
            )
        named.append(short(key).strip("'\""))
    if not named:
        return []
    more = f" and {len(named) - MAX_NAMED} more" if len(named) > MAX_NAMED else ""
    return [
        f"{fields.source}: a {model.model_type} does not read {', '.join(named[:MAX_NAMED])}{more}; computed as without, "
        "as transformers does"
    ]


def _is_neutral(key: str, value: Any, model: ModelConfig) -> bool:
    if key in LISTS_OF_ONES:
        return isinstance(value, list) and all(one == 1 for one in value)
    if key in SAME_AS:
        same = SAME_AS[key](model)
        return bool(value == same or (isinstance(value, float) and abs(value - same) < 1e-6))
    return value in NEUTRAL.get(key, ())

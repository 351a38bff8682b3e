"""A checkpoint without weights: a configuration, a tokenizer of single bytes, a ChatML template."""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers

from fastqwen.text.template import CHATML
from fastqwen.text.tokenizer import byte_alphabet

CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def make_model(folder: Path) -> Path:
    ids = {char: data[0] for char, data in byte_alphabet().items()}
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(ids, []))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    inner.add_special_tokens(CONTROL)
    inner.save(str(folder / "tokenizer.json"))
    config = {
        "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "vocab_size": 256 + len(CONTROL), "hidden_size": 64,
        "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4,
        "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "max_position_embeddings": 8192, "tie_word_embeddings": True,
        "torch_dtype": "float32", "eos_token_id": 258, "hidden_act": "silu",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHATML, "eos_token": "<|im_end|>"}))
    return folder

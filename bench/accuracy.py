"""How far quantized weights are from plain ones: python bench/accuracy.py OUT.json [TOKENS]

The demo's weights and random ones of Qwen3-0.6B's size, each format against float32 over the same text: the mean
Kullback-Leibler divergence of the next token's distribution, and how often its likeliest token is the same. On a CPU.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1]))

from fastqwen.config import EngineConfig
from fastqwen.demo import demo_path
from fastqwen.quant import ONLINE_FORMATS
from fastqwen.text.load import load_text
from fastqwen.weights.checkpoint import open_checkpoint
from fastqwen.weights.gguf_checkpoint import GgufCheckpoint
from tests.models.tiny import logits

ROOT = Path(__file__).parents[1]
TEXT = ROOT / "docs" / "tour.md"
WINDOW = 512  # tokens that are computed together


def plain_demo(folder: Path) -> None:
    """The demo as a folder of plain numbers."""
    checkpoint = open_checkpoint(demo_path())
    model, tensors = checkpoint.model, checkpoint.tensors
    assert isinstance(tensors, GgufCheckpoint) and model.moe is None
    save_file({name: tensors.read(name).float().contiguous() for name in tensors.names()}, folder / "model.safetensors")
    values = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size, "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads, "num_key_value_heads": model.num_kv_heads, "head_dim": model.head_dim,
        "vocab_size": model.vocab_size, "rms_norm_eps": model.rms_norm_eps, "rope_theta": model.rope.theta,
        "max_position_embeddings": model.default_max_len, "tie_word_embeddings": model.tie_word_embeddings,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(values))


def distributions(folder: Path, ids: list[int], **wishes: Any) -> torch.Tensor:
    """Logarithms of the next token's chances, float32 [tokens, vocab]"""
    windows = [ids[start : start + WINDOW] for start in range(0, len(ids), WINDOW)]
    return torch.cat([logits(folder, window, max_model_len=WINDOW, **wishes).log_softmax(-1) for window in windows])


def compare(name: str, folder: Path, ids: list[int], **wishes: Any) -> list[dict[str, Any]]:
    exact, found = distributions(folder, ids, dtype="float32", **wishes), []
    ways: dict[str, dict[str, Any]] = {"bfloat16": {"dtype": "bfloat16"}}
    ways |= {form: {"dtype": "float32", "quantization": form} for form in ONLINE_FORMATS}
    ways |= {f"{form} cache": {"dtype": "float32", "kv_cache_dtype": form} for form in ("int8", "fp8")}
    for way, more in ways.items():
        other = distributions(folder, ids, **wishes, **more)
        divergence = float((exact.exp() * (exact - other)).sum(-1).mean())
        same = float((exact.argmax(-1) == other.argmax(-1)).float().mean())
        found.append({"model": name, "weights": way, "tokens": len(ids), "kl": divergence, "same_top_1": same})
        print(f"{name:12} {way:12} KL {divergence:.2e}, the same likeliest token {100 * same:.1f} %", flush=True)
    return found


def main() -> None:
    out, count = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 2048
    path = demo_path()
    tools = load_text(path, open_checkpoint(path, with_tensors=False).model, EngineConfig(model=str(path)))
    ids = tools.tokenizer.encode(TEXT.read_text(encoding="utf-8"))[:count]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plain_demo(folder)
        found = compare("demo", folder, ids)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copy(ROOT / "tests" / "configs" / "qwen3-0.6b" / "config.json", folder)
        found += compare("random 0.6B", folder, ids[: count // 4], load_format="dummy", seed=1)
    out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()

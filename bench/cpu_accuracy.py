"""What rounded activations change: the demo model's packed products on a CPU against the same file in float32.

    python bench/cpu_accuracy.py [MODEL.gguf] [--tokens 2048]

Both predict every next token of the repository's own documents. Printed: the mean and the largest Kullback-Leibler
divergence of their predictions (nats), how often both have the same likeliest token, and both perplexities.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax

from fastqwen.build import build_decoder
from fastqwen.demo import demo_path
from fastqwen.kernels import StateRoom, StepTokens
from fastqwen.kernels.cpu import build
from fastqwen.kernels.cpu.ops import CpuOps
from fastqwen.layers.decoder import Decoder
from fastqwen.layers.rotary import inverse_frequencies
from fastqwen.model_config import ModelConfig
from fastqwen.text.gguf_tokenizer import tokenizer_from_gguf
from fastqwen.weights.gguf_checkpoint import GgufCheckpoint
from fastqwen.weights.gguf_config import config_from_gguf
from fastqwen.weights.gguf_file import GgufFile
from fastqwen.weights.source import Weights

DOCUMENTS = Path(__file__).parents[1] / "docs"
CONTEXT = 512  # tokens of a piece


def main() -> None:
    parser = argparse.ArgumentParser(description="KL divergence of rounded activations against float32")
    parser.add_argument("model", nargs="?", type=Path, help="a .gguf file; default: the demo model")
    parser.add_argument("--tokens", type=int, default=2048)
    options = parser.parse_args()
    path = options.model or demo_path()
    file = GgufFile(path)
    config = config_from_gguf(file)
    text = "\n".join(document.read_text("utf-8") for document in sorted(DOCUMENTS.glob("*.md")))
    ids = torch.tensor(tokenizer_from_gguf(file.metadata, str(path)).encode(text).ids[: options.tokens])
    exact, rounded = (decoder_of(file, config, dtype) for dtype in (torch.float32, torch.bfloat16))
    with torch.inference_mode():
        pieces = [compare(exact, rounded, config, piece) for piece in ids.split(CONTEXT) if len(piece) > 1]
    columns = [torch.cat(column) for column in zip(*pieces, strict=True)]
    divergence, same, loss, rounded_loss = columns
    found = {
        "model": path.name,
        "tokens": len(divergence),
        "kl_mean": divergence.mean().item(),
        "kl_max": divergence.max().item(),
        "same_top_1": same.double().mean().item(),
        "perplexity_float32": loss.mean().exp().item(),
        "perplexity_packed": rounded_loss.mean().exp().item(),
    }
    print(json.dumps(found))


def decoder_of(file: GgufFile, config: ModelConfig, dtype: torch.dtype) -> Decoder:
    library = build.load()
    assert library is not None, "a C++ compiler is needed"
    return build_decoder(config, Weights(GgufCheckpoint(file, config), dtype, torch.device("cpu")), CpuOps(library))


def compare(
    exact: Decoder, rounded: Decoder, config: ModelConfig, ids: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of each token but the last: divergence, whether both think the same likeliest, and both losses."""
    right, found = (log_softmax(logits_of(decoder, config, ids).double(), dim=-1)[:-1] for decoder in (exact, rounded))
    divergence = (right.exp() * (right - found)).sum(-1)
    losses = [cross_entropy(one, ids[1:], reduction="none") for one in (right, found)]
    return divergence, right.argmax(-1) == found.argmax(-1), losses[0], losses[1]


def logits_of(decoder: Decoder, config: ModelConfig, ids: Tensor) -> Tensor:
    """One sequence, alone, all of it in one block: ids [tokens] -> [tokens, vocab]"""
    count = len(ids)
    positions = torch.arange(count, dtype=torch.int32)
    angles = positions[:, None] * inverse_frequencies(config.rope, config.rotary_dim)[0]
    step = StepTokens(
        positions=positions,
        slots=torch.zeros(count, dtype=torch.int32),
        row_starts=torch.tensor([0, count], dtype=torch.int32),
        cos_sin=torch.cat([angles.cos(), angles.sin()], dim=-1),
        q_scale=None,
        block_tables=torch.zeros(1, 1, dtype=torch.int32),
        num_decode_rows=0,
    )
    states = decoder.make_states(StateRoom(1, count, 1, torch.float32, torch.device("cpu")))
    return decoder.logits(decoder.hidden(ids.int(), step, states))


if __name__ == "__main__":
    main()

"""A tiny checkpoint in the shape of Qwen3-Embedding: random weights, a post-processor that closes a text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
import torch

from tests.models.tiny import make
from tests.reliability.mock_model import CONTROL

VOCAB = 256 + len(CONTROL)
END = 256  # <|endoftext|>


def make_embedder(folder: Path, *, headless: bool = False, closes: bool = True, **changes: Any) -> Any:
    """The transformers base model whose files are in ``folder``. ``headless``: saved as Qwen3-Embedding-8B is, with
    neither an output head nor ``model.`` before its names."""
    whole = make(folder, "Qwen3Config", head_dim=32, vocab_size=VOCAB, eos_token_id=END, **changes)
    base = whole.model
    if headless:
        base.save_pretrained(folder)
    write_tokenizer(folder, closes=closes)
    return base


def write_tokenizer(folder: Path, *, closes: bool) -> None:
    from fastqwen.text.tokenizer import byte_alphabet

    inner = tokenizers.Tokenizer(tokenizers.models.BPE({char: data[0] for char, data in byte_alphabet().items()}, []))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    inner.add_special_tokens(CONTROL)
    if closes:
        inner.post_processor = tokenizers.processors.TemplateProcessing(
            single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", END)]
        )
    inner.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))


def reference(base: Any, ids: list[int], dimensions: int | None = None) -> torch.Tensor:
    """As the model card computes it: the last token's hidden state, cut, of length 1."""
    with torch.no_grad():
        last = base(torch.tensor([ids])).last_hidden_state[0, -1]
    return torch.nn.functional.normalize(last[:dimensions], dim=-1)

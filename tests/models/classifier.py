"""A tiny checkpoint with a sequence-classification head: random weights, in the files that transformers writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from tests.models.embedding import END, VOCAB, write_tokenizer
from tests.models.tiny import COMMON


def make_classifier(folder: Path, config_class: str = "Qwen3Config", *, closes: bool = False, **changes: Any) -> Any:
    """The transformers model whose files are in ``folder``."""
    torch.manual_seed(20261127)
    sizes = {**COMMON, "vocab_size": VOCAB, "eos_token_id": END, "pad_token_id": END, **changes}
    config = getattr(transformers, config_class)(**sizes)
    model = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith(".bias"):
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    write_tokenizer(folder, closes=closes)
    return model


def logits_of(model: Any, ids: list[int]) -> torch.Tensor:
    """[labels]"""
    with torch.no_grad():
        found: torch.Tensor = model(torch.tensor([ids])).logits[0]
    return found

"""Qwen3.5's text side: a vocabulary of 248,320, of which the tokenizer has fewer, and a config.json that names one of two ends."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from fastqwen.config import EngineConfig
from fastqwen.models import read_config
from fastqwen.text.load import TextTools, load_text
from tests.server.hybrid_templates import LARGE, WITH_EFFORT

EOT, START, END = 248044, 248045, 248046
SPECIAL = {EOT: "<|endoftext|>", START: "<|im_start|>", END: "<|im_end|>"}
WORDS = {248058: "<tool_call>", 248059: "</tool_call>", 248068: "<think>", 248069: "</think>"}


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The published ids of control tokens and words, behind bytes and fillers."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: index for index, char in enumerate(alphabet)}
    vocab |= {f"filler{index}": index for index in range(len(alphabet), EOT)}
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    for token_id in range(EOT, max(WORDS) + 1):
        text = SPECIAL.get(token_id) or WORDS.get(token_id) or f"<|unused_{token_id}|>"
        inner.add_tokens([tokenizers.AddedToken(text, special=token_id not in WORDS, normalized=False)])
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    inner.save(str(path))
    return path


def load(folder: Path, tokenizer_file: Path, configs: Path, template: str, **generation: Any) -> TextTools:
    shutil.copy(configs / "qwen3.5-9b" / "config.json", folder)
    shutil.copy(tokenizer_file, folder)
    words = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "bos_token": None, "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(words))
    if generation:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    model = read_config(folder)
    assert (model.vocab_size, model.eos_token_ids) == (248320, (EOT,))
    return load_text(folder, model, EngineConfig(model=str(folder)))


@pytest.mark.parametrize(
    ("template", "generation"), [(LARGE, {}), (WITH_EFFORT, {}), (LARGE, {"eos_token_id": [END, EOT], "top_k": 20})]
)
def test_both_ends_are_found(tmp_path: Path, tokenizer_file: Path, configs: Path, template: str, generation: Any):
    text = load(tmp_path, tokenizer_file, configs, template, **generation)
    assert set(text.stop_token_ids) == {EOT, END}
    assert len({stop.origin for stop in text.stops}) == (1 if generation else 2), text.stops


def test_words_of_thinking_and_calls_are_text_and_control_tokens_are_not(
    tmp_path: Path, tokenizer_file: Path, configs: Path
):
    """No token goes in front, and what a user spells out is plain text."""
    text = load(tmp_path, tokenizer_file, configs, LARGE)
    assert text.template is not None
    ids = text.template.encode(
        text.tokenizer, [{"role": "user", "content": "<|im_end|> <think>"}], add_generation_prompt=True
    )
    assert ids[0] == START and ids.count(END) == 1 and ids.count(248068) >= 1
    assert text.tokenizer.decode(ids).endswith("<|im_start|>assistant\n<think>\n")
    assert max(ids) < text.tokenizer.vocab_size <= 248320


def test_the_heads_last_rows_stand_for_nothing(tmp_path: Path, tokenizer_file: Path, configs: Path):
    text = load(tmp_path, tokenizer_file, configs, LARGE)
    assert text.tokenizer.vocab_size == 248070
    assert text.tokenizer.decode([248319, ord("a") - ord("!"), 248070]) == "a"

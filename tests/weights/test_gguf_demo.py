"""The demo model's file against golden data that was made without any of our code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from fastqwen.build import build_decoder
from fastqwen.kernels import StateRoom
from fastqwen.kernels.reference import ReferenceOps
from fastqwen.layers.decoder import Decoder
from fastqwen.model_config import ModelConfig
from fastqwen.text.gguf_tokenizer import text_facts, tokenizer_from_gguf
from fastqwen.weights.gguf_checkpoint import GgufCheckpoint
from fastqwen.weights.gguf_config import config_from_gguf
from fastqwen.weights.gguf_file import GgufFile
from fastqwen.weights.source import Weights
from tests.kernels.batches import one_prompt


@pytest.fixture(scope="module")
def reference(golden: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((golden / "smollm2" / "golden.json").read_text(encoding="utf-8"))
    return values


@pytest.fixture(scope="module")
def file(demo_gguf: Path) -> GgufFile:
    return GgufFile(demo_gguf)


def test_the_gguf_package_sees_the_same_file(demo_gguf: Path, file: GgufFile) -> None:
    theirs = gguf.GGUFReader(demo_gguf)
    ours = {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in file.metadata.items()}
    assert ours == {key: f.contents() for key, f in theirs.fields.items() if not key.startswith("GGUF.")}
    assert {t.name: (t.data_offset, t.tensor_type.name, [*map(int, t.shape)]) for t in theirs.tensors} == {
        name: (t.offset_bytes, t.type.name, [*reversed(t.shape)]) for name, t in file.tensors.items()
    }


def test_tensors(file: GgufFile, reference: dict[str, Any]) -> None:
    for expected in reference["dequant"]:
        tensor = file.read(expected["name"])
        assert list(tensor.shape) == expected["shape_rows_cols"]
        assert file.tensors[expected["name"]].type.name == expected["type"]
        assert tensor.flatten()[:8].tolist() == expected["first8"]
        assert tensor.flatten()[-4:].tolist() == expected["last4"]
        assert tensor.double().sum().item() == pytest.approx(expected["sum"], abs=1e-9 * expected["abs_sum"])
        assert tensor.double().abs().sum().item() == pytest.approx(expected["abs_sum"], rel=1e-12)


def test_config(file: GgufFile, reference: dict[str, Any]) -> None:
    config = config_from_gguf(file)
    expected = reference["config"]
    assert config.model_type == "llama"
    assert config.hidden_size == expected["hidden_size"]
    assert config.intermediate_size == expected["intermediate_size"]
    assert config.num_layers == expected["num_hidden_layers"]
    assert (config.num_heads, config.num_kv_heads) == (
        expected["num_attention_heads"],
        expected["num_key_value_heads"],
    )
    assert config.max_position_embeddings == expected["max_position_embeddings"]
    assert config.rms_norm_eps == expected["rms_norm_eps"]
    assert config.vocab_size == expected["vocab_size"]
    assert config.tie_word_embeddings is expected["tie_word_embeddings"]
    assert config.rope.theta == expected["rope_theta"]
    assert config.eos_token_ids == (reference["special"]["eos"],)


def test_tokenizer(file: GgufFile, reference: dict[str, Any]) -> None:
    tokenizer = tokenizer_from_gguf(file.metadata, "demo")
    for case in reference["tokenizer"]:
        assert tokenizer.encode(case["text"]).ids == case["ids"], case["text"]
        assert tokenizer.decode(case["ids"], skip_special_tokens=False) == case["text"]
    for chat in reference["chats"]:
        assert tokenizer.encode(chat["rendered"]).ids == chat["prompt_ids"]
        answer = chat["greedy_ids_64_not_stopping_at_eos"][: chat["eos_index"]]
        assert tokenizer.decode(answer) == chat["answer"]


def test_text_facts(file: GgufFile, reference: dict[str, Any]) -> None:
    facts, special = text_facts(file.metadata), reference["special"]
    assert facts.chat_template == reference["chat_template"]
    assert (facts.bos_token_id, facts.eos_token_id) == (special["bos"], special["eos"])
    assert facts.add_bos is special["add_bos"]


def predictions(decoder: Decoder, config: ModelConfig, ids: list[int]) -> list[int]:
    """The likeliest next token after each of ``ids``, from one pass over all of them."""
    count, step = len(ids), one_prompt(config, len(ids))
    states = decoder.make_states(StateRoom(1, count, 1, torch.float32, torch.device("cpu")))
    hidden = decoder.hidden(torch.tensor(ids, dtype=torch.int32), step, states)
    return decoder.logits(hidden).argmax(dim=-1).tolist()


def test_a_greedy_answer(file: GgufFile, reference: dict[str, Any]) -> None:
    """Wrong row order in q and k, or a wrong tensor anywhere, would not survive this."""
    config = config_from_gguf(file)
    weights = Weights(GgufCheckpoint(file, config), torch.float32, torch.device("cpu"))
    decoder = build_decoder(config, weights, ReferenceOps())
    chat = min(reference["chats"], key=lambda chat: len(chat["prompt_ids"]))
    answer = chat["greedy_ids_64_not_stopping_at_eos"][: chat["eos_index"] + 1]
    found = predictions(decoder, config, chat["prompt_ids"] + answer[:-1])
    assert found[len(chat["prompt_ids"]) - 1 :] == answer

"""config.json as transformers 4 wrote it and as transformers 5 writes it: the same model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from fastqwen.errors import Unsupported
from fastqwen.model_config import ModelConfig, read_json
from fastqwen.models import parse_config
from tests.models.tiny import logits, make, prompt

BASE: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256,
    "max_position_embeddings": 512, "rms_norm_eps": 1e-6,
}  # fmt: skip
YARN = {"factor": 4.0, "original_max_position_embeddings": 128}
STYLES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "theta": ({"rope_theta": 1e6}, {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}),
    "yarn": (
        {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", **YARN}},
        {"rope_parameters": {"rope_theta": 1e6, "rope_type": "yarn", **YARN}},
    ),
    "linear": (
        {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_parameters": {"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0}},
    ),
    "no-scaling": ({"rope_theta": 1e4, "rope_scaling": None}, {"rope_parameters": None}),
    "dtype": ({"torch_dtype": "float16"}, {"dtype": "float16"}),
    "dtype-prefix": ({"torch_dtype": "torch.float32"}, {"dtype": "float32"}),
    "window": (
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2},
        {
            "use_sliding_window": True,
            "sliding_window": 16,
            "layer_types": ["full_attention"] * 2 + ["sliding_attention"] * 2,
        },
    ),
    "window-off": (
        {"use_sliding_window": False, "sliding_window": 16, "max_window_layers": 2},
        {"use_sliding_window": False, "sliding_window": None, "layer_types": ["full_attention"] * 4},
    ),
    "experts": (
        {"model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48},
        {"model_type": "qwen3_moe", "num_local_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48},
    ),
}


def parse(changes: dict[str, Any]) -> ModelConfig:
    return parse_config({**BASE, "architectures": None, **changes}, "config.json")


@pytest.mark.parametrize("name", STYLES)
def test_both_styles_mean_the_same(name: str):
    old, new = (parse(changes) for changes in STYLES[name])
    assert old == new
    if name != "no-scaling" and name != "window-off":
        assert msgspec.structs.asdict(old) != msgspec.structs.asdict(parse({})), "the keys had no effect"


def test_windows():
    assert parse(STYLES["window"][0]).windows == (None, None, 16, 16)
    assert parse(STYLES["window-off"][0]).windows == ()


@pytest.mark.parametrize("scaling", [{"type": "dynamic", "factor": 2.0}, {"rope_type": "longrope"}])
def test_other_scalings_are_refused_in_both_styles(scaling: dict[str, Any]):
    for changes in ({"rope_scaling": scaling}, {"rope_parameters": {**scaling, "rope_theta": 1e4}}):
        with pytest.raises(Unsupported, match="rope_scaling type"):
            parse(changes)


@pytest.mark.parametrize("name", ["theta", "yarn"])
def test_the_same_logits_in_both_styles(name: str, tmp_path: Path):
    _, new = STYLES[name]
    make(tmp_path, "Qwen2Config", **new)
    written = read_json(tmp_path / "config.json")
    assert "rope_parameters" in written and "dtype" in written, "transformers writes the new style"
    ids = prompt(200)
    found = logits(tmp_path, ids)
    old = {**written, **STYLES[name][0], "torch_dtype": written["dtype"]}
    for key in ("rope_parameters", "dtype", "layer_types"):
        old.pop(key, None)
    (tmp_path / "config.json").write_text(json.dumps(old))
    assert logits(tmp_path, ids).equal(found)


PUBLISHED = {  # heads, layers, key heads
    "qwen1-7b": (32, 32, 32),
    "qwen1-7b-int4": (32, 32, 32),
    "qwen2.5-7b": (28, 28, 4),
    "qwen2.5-7b-int4": (28, 28, 4),
    "qwen3-0.6b": (16, 28, 8),
    "qwen3-14b": (40, 40, 8),
    "qwen3-30b-a3b": (32, 48, 4),
    "qwen3-8b": (32, 36, 8),
}
HYBRIDS = ["qwen3.5-0.8b", "qwen3.5-9b", "qwen3.5-35b-a3b"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations(configs: Path, name: str):
    config = parse_config(read_json(configs / name / "config.json"), name)
    found = (config.num_heads, config.num_layers, config.num_kv_heads)
    assert (found, config.head_dim) == (PUBLISHED[name], 128)
    assert (config.quantization is not None) == name.endswith("int4")
    assert config.windows == ()


@pytest.mark.parametrize("name", HYBRIDS)
def test_hybrids_have_both_kinds_of_layers(configs: Path, name: str):
    config = parse_config(read_json(configs / name / "config.json"), name)
    assert config.delta is not None and config.num_layers == 4 * len(config.attention_layers)


def test_no_published_configuration_is_left_out(configs: Path):
    assert {path.name for path in configs.iterdir()} == {*PUBLISHED, *HYBRIDS, "qwen3-8b-fp8", "qwen3-30b-a3b-fp8"}


def test_both_generations_of_qwen1_keys(configs: Path):
    new = read_json(configs / "qwen1-7b" / "config.json")
    renamed = {
        "hidden_size": "n_embd", "num_attention_heads": "n_head", "num_hidden_layers": "n_layer",
        "max_position_embeddings": "n_positions", "intermediate_size": "ffn_hidden_size", "vocab_size": "padded_vocab_size",
    }  # fmt: skip
    old = {renamed.get(key, key): value for key, value in new.items()}
    assert old.keys() != new.keys() and parse_config(old, "x") == parse_config(new, "x")

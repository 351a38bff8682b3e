"""Damaged and contradicting checkpoints: one line that names the file and what is wrong, never a traceback."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file

from fastqwen import LLM
from fastqwen.errors import BadCheckpoint, FastqwenError, ModelNotFound, Unsupported
from tests.models.tiny import MOE, make, make_qwen1

Damage = Callable[[Path], Any]


def config(folder: Path, **changes: Any) -> None:
    """Change config.json; None removes a key."""
    values = json.loads((folder / "config.json").read_text())
    values.update(changes)
    (folder / "config.json").write_text(json.dumps({key: one for key, one in values.items() if one is not None}))


def write(name: str, data: str | bytes) -> Damage:
    return lambda folder: (folder / name).write_bytes(data if isinstance(data, bytes) else data.encode())


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Damage:
    def damage(folder: Path) -> None:
        found = load_file(folder / "model.safetensors")
        change(found)
        save_file(found, folder / "model.safetensors")

    return damage


def shards(folder: Path, *, missing: bool = False, name: str = "model-00002-of-00002.safetensors") -> None:
    """The checkpoint cut in two with an index."""
    found = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(found)
    parts = {"model-00001-of-00002.safetensors": names[::2], name: names[1::2]}
    for part, own in parts.items():
        if "/" not in part:
            save_file({key: found[key] for key in own}, folder / part)
    index = {"weight_map": {key: part for part, own in parts.items() for key in own}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    if missing:
        (folder / name).unlink()


def index(text: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
        (folder / "model.safetensors.index.json").write_text(text)

    return damage


def lying_index(folder: Path) -> None:
    shards(folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shard = folder / index["weight_map"][DOWN]
    found = load_file(shard)
    del found[DOWN]
    save_file(found, shard)


def header(text: str, size: int | None = None) -> Damage:
    data = text.encode()
    return write("model.safetensors", struct.pack("<Q", len(data) if size is None else size) + data)


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size - 100)


def nan(name: str) -> Damage:
    return tensors(lambda found: found[name].view(-1)[3:4].fill_(float("nan")))


WEIGHTS = "model.safetensors"
DOWN = "model.layers.1.mlp.down_proj.weight"
DAMAGES: dict[str, tuple[Damage, str, type[FastqwenError]]] = {
    # config.json
    "not-json": (write("config.json", "{"), "config.json is not valid JSON", BadCheckpoint),
    "empty": (write("config.json", ""), "config.json is empty", BadCheckpoint),
    "binary": (write("config.json", b"\xff\xfe\x00"), "config.json is not valid JSON", BadCheckpoint),
    "a-list": (write("config.json", "[1]"), "config.json holds list", BadCheckpoint),
    "deep": (write("config.json", "[" * 10**6), "config.json is not valid JSON", BadCheckpoint),
    "deep-value": (write("config.json", '{"a":' * 10**5 + "1" + "}" * 10**5), "config.json", BadCheckpoint),
    "huge-number": (write("config.json", '{"a": 1' + "0" * 10**5 + "}"), "config.json", BadCheckpoint),
    "huge-file": (lambda folder: os.truncate(folder / "config.json", 2**25), "larger than", BadCheckpoint),
    "no-config": (lambda folder: (folder / "config.json").unlink(), "config.json", ModelNotFound),
    "no-model-type": (lambda folder: config(folder, model_type=None), "model_type is missing", BadCheckpoint),
    "model-type-number": (lambda folder: config(folder, model_type=5), "model_type is missing", BadCheckpoint),
    "unknown-model-type": (lambda folder: config(folder, model_type="mamba"), "'mamba'", Unsupported),
    "path-as-model-type": (lambda folder: config(folder, model_type="../names"), "'../names'", Unsupported),
    "module-as-model-type": (lambda folder: config(folder, model_type="names"), "'names'", Unsupported),
    "unknown-architecture": (
        lambda folder: config(folder, architectures=["Qwen2ForQuestionAnswering"]),
        "Qwen2ForQuestionAnswering",
        Unsupported,
    ),
    "unknown-quantization": (
        lambda folder: config(folder, quantization_config={"quant_method": "exl9"}),
        "'exl9'",
        Unsupported,
    ),
    "no-quant-method": (lambda folder: config(folder, quantization_config={}), "quantization method", Unsupported),
    "quantization-list": (lambda folder: config(folder, quantization_config=[]), "quantization_config", BadCheckpoint),
    "gelu": (lambda folder: config(folder, hidden_act="gelu"), "hidden_act", Unsupported),
    "no-hidden-size": (lambda folder: config(folder, hidden_size=None), "hidden_size is missing", BadCheckpoint),
    "text-as-size": (lambda folder: config(folder, hidden_size="64"), "hidden_size is '64'", BadCheckpoint),
    "fraction-as-size": (lambda folder: config(folder, hidden_size=64.5), "hidden_size is 64.5", BadCheckpoint),
    "bool-as-size": (lambda folder: config(folder, hidden_size=True), "hidden_size is True", BadCheckpoint),
    "zero-layers": (lambda folder: config(folder, num_hidden_layers=0), "num_hidden_layers is 0", BadCheckpoint),
    "negative-heads": (lambda folder: config(folder, num_attention_heads=-4), "num_attention_heads", BadCheckpoint),
    "uneven-groups": (lambda folder: config(folder, num_key_value_heads=3), "no multiple of", BadCheckpoint),
    "infinite-eps": (write("config.json", '{"model_type": "qwen2", "rms_norm_eps": Infinity}'), "", BadCheckpoint),
    "nan-theta": (lambda folder: config(folder, rope_theta=float("nan"), rope_parameters=None), "theta", BadCheckpoint),
    "zero-theta": (lambda folder: config(folder, rope_theta=0, rope_parameters=None), "theta", BadCheckpoint),
    "odd-head": (lambda folder: config(folder, head_dim=15), "head_dim", BadCheckpoint),
    "rope-text": (lambda folder: config(folder, rope_parameters="yarn"), "rope_parameters", BadCheckpoint),
    "rope-unknown": (lambda folder: config(folder, rope_parameters={"rope_type": "su"}), "'su'", Unsupported),
    "rope-factor": (
        lambda folder: config(folder, rope_parameters={"rope_type": "yarn", "factor": "4"}),
        "factor is '4'",
        BadCheckpoint,
    ),
    "rope-factor-zero": (
        lambda folder: config(folder, rope_parameters={"rope_type": "linear", "factor": 0}),
        "factor is 0",
        BadCheckpoint,
    ),
    "eos-text": (lambda folder: config(folder, eos_token_id=["<eos>"]), "eos_token_id", BadCheckpoint),
    "bos-text": (lambda folder: config(folder, bos_token_id="<bos>"), "bos_token_id", BadCheckpoint),
    "layer-types-text": (
        lambda folder: config(folder, sliding_window=16, use_sliding_window=True, layer_types="full"),
        "layer_types",
        BadCheckpoint,
    ),
    "layer-types-unknown": (
        lambda folder: config(
            folder, sliding_window=16, use_sliding_window=True, layer_types=["full_attention", [], "x"]
        ),
        "layer_types",
        BadCheckpoint,
    ),
    "layer-types-short": (
        lambda folder: config(
            folder, sliding_window=16, use_sliding_window=True, layer_types=["full_attention"]
        ),
        "layer_types has 1 entries for 3 layers",
        BadCheckpoint,
    ),
    # weights
    "wrong-shape": (lambda folder: config(folder, intermediate_size=97), "has shape [96, 64]", BadCheckpoint),
    "other-vocabulary": (lambda folder: config(folder, vocab_size=999), "[256, 64], config.json says", BadCheckpoint),
    "more-layers": (lambda folder: config(folder, num_hidden_layers=4, layer_types=None), "model.layers.3.", BadCheckpoint),
    "missing-tensor": (tensors(lambda found: found.pop(DOWN)), f"{DOWN} is missing", BadCheckpoint),
    "missing-bias": (
        tensors(lambda found: found.pop("model.layers.0.self_attn.k_proj.bias")), "k_proj.bias is missing", BadCheckpoint,
    ),
    "extra-dimension": (
        tensors(lambda found: found.update({DOWN: found[DOWN][None]})), "has shape [1, 64, 96]", BadCheckpoint,
    ),
    "integers": (
        tensors(lambda found: found.update({DOWN: found[DOWN].to(torch.int32)})), "holds int32", BadCheckpoint,
    ),
    "nan-matrix": (nan(DOWN), f"{DOWN} contains NaN", BadCheckpoint),
    "nan-embedding": (nan("model.embed_tokens.weight"), "embed_tokens.weight contains NaN", BadCheckpoint),
    "infinite-norm": (
        tensors(lambda found: found["model.norm.weight"].fill_(float("inf"))), "norm.weight contains", BadCheckpoint,
    ),
    "truncated": (truncate, f"{WEIGHTS} is damaged", BadCheckpoint),
    "empty-file": (write(WEIGHTS, b""), f"{WEIGHTS} is empty", BadCheckpoint),
    "garbage-file": (write(WEIGHTS, os.urandom(4096)), f"{WEIGHTS} is damaged", BadCheckpoint),
    "huge-header": (header("{}", 2**62), f"{WEIGHTS} is damaged", BadCheckpoint),
    "header-no-json": (header("{x"), f"{WEIGHTS} is damaged", BadCheckpoint),
    "offsets-outside": (
        header(json.dumps({DOWN: {"dtype": "F32", "shape": [64, 96], "data_offsets": [0, 24576]}})),
        f"{WEIGHTS} is damaged",
        BadCheckpoint,
    ),
    "a-directory": (
        lambda folder: ((folder / WEIGHTS).unlink(), (folder / WEIGHTS).mkdir()), f"{WEIGHTS} is a folder", BadCheckpoint,
    ),
    "no-weights": (lambda folder: (folder / WEIGHTS).unlink(), "no .safetensors files", ModelNotFound),
    "missing-shard": (lambda folder: shards(folder, missing=True), "model-00002-of-00002", BadCheckpoint),
    "shard-elsewhere": (lambda folder: shards(folder, name="../x.safetensors"), "'../x.safetensors'", BadCheckpoint),
    "lying-index": (lying_index, f"{DOWN} is missing", BadCheckpoint),
    "index-no-json": (index("{"), "index.json is not valid JSON", BadCheckpoint),
    "index-no-map": (index('{"weight_map": 5}'), "weight_map", BadCheckpoint),
    "index-bad-names": (index('{"weight_map": {"a": [1]}}'), "index.json", BadCheckpoint),
    "index-empty": (index("{}"), "weight_map", BadCheckpoint),
    # the text side
    "no-tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "no tokenizer.json", BadCheckpoint),
    "tokenizer-no-json": (write("tokenizer.json", "{"), "tokenizer.json is damaged", BadCheckpoint),
    "tokenizer-empty-object": (write("tokenizer.json", "{}"), "tokenizer.json is damaged", BadCheckpoint),
    "tokenizer-binary": (write("tokenizer.json", b"\xff\xfe"), "tokenizer.json is damaged", BadCheckpoint),
    "tokenizer-too-large": (lambda folder: config(folder, vocab_size=200), "200 rows", BadCheckpoint),
    "template-syntax": (write("chat_template.jinja", "{% for x %}"), "chat_template.jinja", BadCheckpoint),
    "template-binary": (write("chat_template.jinja", b"\xff\x80"), "chat_template.jinja", BadCheckpoint),
    "tokenizer-config": (write("tokenizer_config.json", "[]"), "tokenizer_config.json", BadCheckpoint),
    "generation-config": (write("generation_config.json", "{"), "generation_config.json", BadCheckpoint),
    "generation-temperature": (
        write("generation_config.json", '{"temperature": -3}'), "generation_config.json", BadCheckpoint,
    ),
}  # fmt: skip


def small(folder: Path) -> None:
    """A Qwen2 of 256 tokens with its tokenizer."""
    make(folder, "Qwen2Config")
    (folder / "generation_config.json").unlink()
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    inner = tokenizers.Tokenizer(tokenizers.models.BPE({char: index for index, char in enumerate(alphabet)}, []))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    inner.save(str(folder / "tokenizer.json"))


def check_line(line: str, folder: Path, words: str) -> None:
    assert words in line and str(folder) in line, line
    assert "\n" not in line and len(line) < 700


@pytest.mark.parametrize("name", DAMAGES)
def test_one_line_that_names_file_and_fault(name: str, tmp_path: Path):
    damage, words, kind = DAMAGES[name]
    small(tmp_path)
    damage(tmp_path)
    with pytest.raises(kind) as caught:
        LLM(str(tmp_path))
    check_line(str(caught.value), tmp_path, words)


def test_the_undamaged_model_loads(tmp_path: Path):
    small(tmp_path)
    shards(tmp_path)
    assert LLM(str(tmp_path)).generate("ab", use_tqdm=False)[0].outputs[0].token_ids


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kv_channels": 15}, "kv_channels"),
        ({"no_bias": False}, "no_bias"),
        ({"rotary_pct": 0.5}, "rotary_pct"),
        ({"seq_length": 0}, "seq_length is 0"),
        ({"seq_length": 1}, "seq_length is 1"),
        ({"rotary_emb_base": "x"}, "rotary_emb_base"),
        ({"intermediate_size": 193}, "intermediate_size"),
        ({"vocab_size": 300}, "transformer.wte.weight"),
    ],
)
def test_qwen1(changes: dict[str, Any], words: str, tmp_path: Path):
    make_qwen1(tmp_path)
    config(tmp_path, **changes)
    with pytest.raises(BadCheckpoint) as caught:
        LLM(str(tmp_path), skip_tokenizer_init=True)
    check_line(str(caught.value), tmp_path, words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_local_experts": 9}, "gate.weight"),  # as transformers 5 writes the number of experts
        ({"num_experts_per_tok": 9}, "num_experts_per_tok"),
        ({"moe_intermediate_size": 47}, "experts.0"),
        ({"mlp_only_layers": "all"}, "mlp_only_layers"),
        ({"mlp_only_layers": [[1]]}, "mlp_only_layers"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step is 0"),
        ({"decoder_sparse_step": 2}, "is missing"),
    ],
)
def test_experts(changes: dict[str, Any], words: str, tmp_path: Path):
    make(tmp_path, "Qwen3MoeConfig", **MOE, head_dim=16)
    config(tmp_path, **changes)
    with pytest.raises(BadCheckpoint) as caught:
        LLM(str(tmp_path), skip_tokenizer_init=True)
    check_line(str(caught.value), tmp_path, words)


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("generate", "deep"),
        ("generate", "truncated"),
        ("generate", "nan-matrix"),
        ("serve", "nan-matrix"),  # found by the engine's process
        ("serve", "missing-shard"),
        ("serve", "tokenizer-too-large"),  # found before that is started
        ("serve", "unknown-quantization"),
        ("check", "wrong-shape"),
    ],
)
def test_through_the_command_line(command: str, name: str, tmp_path: Path):
    damage, words, _ = DAMAGES[name]
    small(tmp_path)
    damage(tmp_path)
    extra = {"generate": ["hello"], "serve": ["--port", "0"], "check": []}[command]
    done = subprocess.run(
        [sys.executable, "-m", "fastqwen.cli.main", command, str(tmp_path), *extra],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1 and done.stdout == ""
    assert "Traceback" not in done.stderr, done.stderr
    [line] = [line for line in done.stderr.splitlines() if line.startswith("fastqwen: ")]
    check_line(line, tmp_path, words)


@pytest.mark.parametrize(
    "values",
    [
        {"model_type": "x" * 5000},
        {"model_type": "qwen3", "architectures": ["x" * 5000]},
        {"rope_parameters": {"rope_type": "x" * 5000, "factor": 2.0}},
    ],
    ids=lambda values: next(iter(values)),
)
def test_a_long_word_is_shown_short(values: dict, tmp_path: Path):
    small(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    with pytest.raises(BadCheckpoint) as caught:
        LLM(str(tmp_path))
    assert "xxx..." in str(caught.value)
    assert len(str(caught.value)) < len(str(path)) + 200

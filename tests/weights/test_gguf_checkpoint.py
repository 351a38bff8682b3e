"""A GGUF seen as a checkpoint: names, shapes, the rotary order, experts, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from fastqwen.build import build_decoder
from fastqwen.errors import BadCheckpoint, Unsupported
from fastqwen.kernels.reference import ReferenceOps
from fastqwen.layers.rotary import inverse_frequencies
from fastqwen.model_config import ModelConfig, RopeConfig
from fastqwen.weights.gguf_checkpoint import GgufCheckpoint
from fastqwen.weights.gguf_config import MODEL_TYPES, config_from_gguf
from fastqwen.weights.gguf_file import GgufFile
from fastqwen.weights.source import Weights
from tests.weights.gguf_writer import Packed, Typed, write_gguf
from tests.weights.tiny_gguf import EXPERT_SIZE, EXPERTS, HEAD_DIM, HEADS, HIDDEN, KV_HEADS, SHARED_SIZE, TinyGguf, tiny


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tiny.gguf"


def opened(model: TinyGguf, path: Path) -> tuple[ModelConfig, GgufCheckpoint]:
    file = GgufFile(model.write(path))
    config = config_from_gguf(file)
    return config, GgufCheckpoint(file, config)


def interleaved(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """How a llama GGUF stores what Hugging Face has as two halves: row 2i is from the first half, 2i + 1 the second."""
    out = torch.empty_like(rows)
    for head in range(heads):
        start, half = head * HEAD_DIM, HEAD_DIM // 2
        for i in range(half):
            out[start + 2 * i] = rows[start + i]
            out[start + 2 * i + 1] = rows[start + half + i]
    return out


@pytest.mark.parametrize("architecture", MODEL_TYPES)
def test_every_tensor_is_found_under_its_own_name(path: Path, architecture: str) -> None:
    model = tiny(architecture)
    _, checkpoint = opened(model, path)
    expected: dict[str, torch.Tensor] = {}
    for gguf_name, hf_name in model.hf_names.items():
        values = model.values(gguf_name)
        if "{expert}" in hf_name:
            expected |= {hf_name.format(expert=expert): values[expert] for expert in range(EXPERTS)}
        else:
            expected[hf_name] = values[None] if hf_name.endswith("shared_expert_gate.weight") else values
    assert set(checkpoint.names()) == set(expected)
    for name, values in expected.items():
        found = checkpoint.read(name)
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            found = interleaved(found, HEADS if "q_proj" in name else KV_HEADS)
        assert checkpoint.shape(name) == tuple(values.shape)
        assert torch.equal(found, values), name


@pytest.mark.parametrize("architecture", MODEL_TYPES)
@pytest.mark.parametrize("tied", [False, True])
def test_a_decoder_can_be_built(path: Path, architecture: str, tied: bool) -> None:
    config, checkpoint = opened(tiny(architecture, "Q8_0", tied=tied), path)
    assert config.tie_word_embeddings is tied
    decoder = build_decoder(config, Weights(checkpoint, torch.float32, torch.device("cpu")), ReferenceOps())
    assert len(decoder.layers) == config.num_layers


def test_config(path: Path) -> None:
    config, _ = opened(tiny("qwen2"), path)
    assert config.packed_bytes is not None
    assert msgspec.structs.replace(config, packed_bytes=None) == ModelConfig(
        model_type="qwen2",
        vocab_size=40,
        hidden_size=HIDDEN,
        num_layers=2,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        intermediate_size=96,
        rms_norm_eps=float(np.float32(1e-5)),
        tie_word_embeddings=False,
        max_position_embeddings=512,
        rope=RopeConfig(theta=50000.0, trained_len=512),
        qkv_bias=True,
        dtype="float32",
        eos_token_ids=(3,),
        bos_token_id=1,
    )


@pytest.mark.parametrize(("architecture", "normalize"), [("qwen2moe", False), ("qwen3moe", True)])
def test_moe_config(path: Path, architecture: str, normalize: bool) -> None:
    moe = opened(tiny(architecture), path)[0].moe
    assert moe is not None
    assert (moe.num_experts, moe.experts_per_token, moe.expert_size) == (EXPERTS, 2, EXPERT_SIZE)
    assert moe.normalize_top_k is normalize
    assert moe.shared_size == (SHARED_SIZE if architecture == "qwen2moe" else 0)
    assert moe.sparse_layers == (0, 1)


def test_heads_have_the_size_that_the_gguf_means(path: Path) -> None:
    # Without the key a GGUF means hidden / heads, where Qwen3's config.json would mean 128.
    assert opened(tiny("qwen3"), path)[0].head_dim == HEAD_DIM


def test_a_value_for_each_layer_must_be_one_value(path: Path) -> None:
    model = tiny("qwen3")
    model.metadata["qwen3.attention.head_count_kv"] = [KV_HEADS, KV_HEADS]
    assert opened(model, path)[0].num_kv_heads == KV_HEADS
    model.metadata["qwen3.attention.head_count_kv"] = [KV_HEADS, HEADS]
    with pytest.raises(Unsupported, match="head_count_kv is not one number for all layers"):
        opened(model, path)


def test_only_one_expert_is_unpacked_at_a_time(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, checkpoint = opened(tiny("qwen3moe", "Q8_0"), path)
    monkeypatch.setattr(GgufFile, "read", lambda *_: pytest.fail("read the whole stack"))
    assert checkpoint.read("model.layers.1.mlp.experts.3.down_proj.weight").shape == (HIDDEN, EXPERT_SIZE)


def test_stop_tokens_come_from_eos_and_eot(path: Path) -> None:
    model = tiny("llama")
    model.metadata |= {"tokenizer.ggml.eos_token_id": 7, "tokenizer.ggml.eot_token_id": 9}
    assert opened(model, path)[0].eos_token_ids == (7, 9)
    model.metadata["tokenizer.ggml.eot_token_id"] = 7
    assert opened(model, path)[0].eos_token_ids == (7,)


def test_rope_scaling(path: Path) -> None:
    model = tiny("qwen2")
    model.metadata |= {
        "qwen2.rope.scaling.type": "yarn",
        "qwen2.rope.scaling.factor": 4.0,
        "qwen2.rope.scaling.original_context_length": 128,
    }
    expected = RopeConfig(theta=50000.0, kind="yarn", factor=4.0, trained_len=128)
    assert opened(model, path)[0].rope == expected
    model.metadata["qwen2.rope.scaling.type"] = "longrope"
    with pytest.raises(Unsupported, match=r"rope\.scaling\.type is 'longrope'; supported: none, linear, yarn"):
        opened(model, path)


@pytest.mark.parametrize(
    ("keys", "factor"),
    [
        ({"rope.scaling.factor": 4.0}, 4.0),  # llama.cpp: without a type it is linear
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, 4.0),
        ({"rope.scale_linear": 4.0}, 4.0),  # its older name
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, None),
        ({"rope.scaling.type": "linear"}, None),
        ({"rope.scaling.factor": 1.0}, None),
        ({"rope.scale_linear": 0.0}, None),
    ],
    ids=str,
)
def test_a_factor_alone_scales_all_positions(path: Path, keys: dict[str, Any], factor: float | None) -> None:
    model = tiny("qwen2")
    model.metadata |= {f"qwen2.{key}": value for key, value in keys.items()}
    linear = {} if factor is None else {"kind": "linear", "factor": factor}
    assert opened(model, path)[0].rope == RopeConfig(theta=50000.0, trained_len=512, **linear)


@pytest.mark.parametrize("kind", ["adapter", "mmproj", "imatrix", "controlvector", 5])
def test_what_is_no_model_is_named(path: Path, kind: Any) -> None:
    model = tiny("qwen2")
    model.metadata["general.type"] = kind
    with pytest.raises(Unsupported, match=f"general.type is {kind!r}"):
        opened(model, path)
    model.metadata["general.type"] = "model"
    opened(model, path)


def rope_factors(values: np.ndarray) -> Packed:
    return Packed("F32", values.shape, values.astype("<f4").tobytes())


def test_llama_31_frequencies_are_recognised(path: Path) -> None:
    scaled = RopeConfig(theta=50000.0, kind="llama3", factor=32.0, trained_len=8192)
    plain, _ = inverse_frequencies(RopeConfig(theta=50000.0), HEAD_DIM)
    divisors = (plain / inverse_frequencies(scaled, HEAD_DIM)[0]).numpy()
    assert 1.0 < divisors[-3] < 32.0  # the blend between the two ends is tested, too
    model = tiny("llama")
    model.tensors["rope_freqs.weight"] = rope_factors(divisors)
    assert opened(model, path)[0].rope == scaled
    model.tensors["rope_freqs.weight"] = rope_factors(divisors[::-1])
    with pytest.raises(Unsupported, match=r"rope_freqs\.weight holds another scaling"):
        opened(model, path)
    model.tensors["rope_freqs.weight"] = rope_factors(divisors[:5])
    with pytest.raises(Unsupported, match=r"rope_freqs\.weight"):
        opened(model, path)


@pytest.mark.parametrize("architecture", ["qwen35", "qwen35moe", "qwen3next"])
def test_a_hybrid_is_refused_with_what_to_take_instead(path: Path, architecture: str) -> None:
    model = tiny("qwen2")
    model.metadata["general.architecture"] = architecture
    with pytest.raises(Unsupported, match=rf"'{architecture}': .*heads in another order.*safetensors"):
        opened(model, path)


@pytest.mark.parametrize("architecture", ["deepseek2", 7, ["qwen2"], None])
def test_an_unknown_architecture_is_named_with_the_known_ones(path: Path, architecture: Any) -> None:
    model = tiny("qwen2")
    model.metadata["general.architecture"] = architecture
    if architecture is None:
        del model.metadata["general.architecture"]
    with pytest.raises(Unsupported) as caught:
        opened(model, path)
    assert f"general.architecture is {architecture!r}" in str(caught.value)
    assert "llama, qwen2, qwen3, qwen2moe, qwen3moe" in str(caught.value)


REFUSED: dict[str, tuple[str, Any, str]] = {
    "split": ("split.count", 3, "is one part of a model"),
    "softcap": ("qwen2.attn_logit_softcapping", 50.0, "attn_logit_softcapping is 50.0, which is not supported"),
    "window": ("qwen2.attention.sliding_window", 128, "sliding_window is 128"),
    "embedding model": ("qwen2.pooling_type", 1, "pooling_type is 1"),
    "experts": ("qwen2.expert_count", 8, "qwen2 with experts is not supported"),
    "partial rotary": ("qwen2.rope.dimension_count", 8, "supported is only the size of a head, 16"),
    "wide values": ("qwen2.attention.value_length", 32, "supported is only the size of a head, 16"),
    "no layers": ("qwen2.block_count", 0, "num_hidden_layers is 0"),
    "layers of text": ("qwen2.block_count", "2", "num_hidden_layers is '2'"),
    "NaN": ("qwen2.attention.head_count", Typed(6, float("nan")), "num_attention_heads is nan"),
    "infinity": ("qwen2.embedding_length", Typed(6, float("inf")), "hidden_size is inf"),
    "odd heads": ("qwen2.attention.key_length", 15, "heads of 15 numbers cannot be rotated"),
    "end token": ("tokenizer.ggml.eos_token_id", "</s>", "tokenizer.ggml.eos_token_id is '</s>'"),
    "more tokens": ("tokenizer.ggml.tokens", ["a"] * 41, "has 41 tokens, the embedding 40 rows"),
    "missing": ("qwen2.embedding_length", None, "the metadata has no qwen2.embedding_length"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_metadata_is_refused_by_name(path: Path, case: str) -> None:
    key, value, problem = REFUSED[case]
    model = tiny("qwen2")
    model.metadata[key] = value
    if value is None:
        del model.metadata[key]
    with pytest.raises(BadCheckpoint) as caught:
        opened(model, path)
    assert problem in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", ["blk.0.attn_output.bias", "blk.1.attn_q_norm.weight", "blk.2.attn_norm.weight", "x"])
def test_a_tensor_without_a_place_is_refused(path: Path, name: str) -> None:
    model = tiny("qwen2")
    model.tensors[name] = Packed("F32", (HIDDEN,), bytes(4 * HIDDEN))
    with pytest.raises(Unsupported, match=f"1 tensors have no place in a qwen2 model, the first is '{name}'"):
        opened(model, path)


def test_missing_and_misshapen_tensors(path: Path) -> None:
    model = tiny("qwen3moe")
    del model.tensors["blk.1.attn_k.weight"]
    config, checkpoint = opened(model, path)
    with pytest.raises(BadCheckpoint, match=r"tensor model\.layers\.1\.self_attn\.k_proj\.weight is missing"):
        build_decoder(config, Weights(checkpoint, torch.float32, torch.device("cpu")), ReferenceOps())
    model.metadata["qwen3moe.expert_count"] = 5
    with pytest.raises(BadCheckpoint, match="expected one matrix per expert"):
        opened(model, path)
    del model.tensors["token_embd.weight"]
    with pytest.raises(BadCheckpoint, match=r"tensor token_embd\.weight is missing"):
        opened(model, path)


def test_rows_that_are_no_whole_heads(path: Path) -> None:
    model = tiny("llama")
    model.tensors["blk.0.attn_q.weight"] = Packed("F32", (60, HIDDEN), bytes(60 * HIDDEN * 4))
    with pytest.raises(BadCheckpoint, match=r"attn_q\.weight has 60 rows for 4 heads of 16"):
        opened(model, path)


def split(model: TinyGguf, folder: Path, count: int = 3) -> list[Path]:
    names = list(model.tensors)
    paths = [folder / f"m-{number + 1:05d}-of-{count:05d}.gguf" for number in range(count)]
    for number, path in enumerate(paths):
        facts = {"split.no": number, "split.count": count, "split.tensors.count": len(names)}
        write_gguf(
            path,
            {**(model.metadata if number == 0 else {}), **facts},
            {n: model.tensors[n] for n in names[number::count]},
        )
    return paths


def test_a_split_file_is_opened_by_its_first_part(tmp_path: Path) -> None:
    model = tiny("qwen2moe")
    whole = opened(model, tmp_path / "whole.gguf")[1]
    paths = split(model, tmp_path)
    file = GgufFile(paths[0])
    parts = GgufCheckpoint(file, config_from_gguf(file))
    assert parts.names() == whole.names()
    for name in whole.names():
        assert torch.equal(parts.read(name), whole.read(name))
    with pytest.raises(BadCheckpoint, match=r"m-00001-of-00003\.gguf"):
        GgufFile(paths[1])
    paths[2].rename(tmp_path / "elsewhere.gguf")
    with pytest.raises(BadCheckpoint, match=r"m-00003-of-00003\.gguf"):
        GgufFile(paths[0])
    (tmp_path / "elsewhere.gguf").rename(paths[2])
    paths[1].write_bytes(paths[2].read_bytes())
    with pytest.raises(BadCheckpoint, match="not part 2 of 3"):
        GgufFile(paths[0])


def test_gate_and_up_of_all_experts_in_one_tensor(path: Path, tmp_path: Path) -> None:
    model = tiny("qwen3moe")
    apart = opened(model, tmp_path / "apart.gguf")[1]
    for layer in range(2):
        names = [f"blk.{layer}.ffn_{part}_exps.weight" for part in ("gate", "up")]
        both = torch.cat([model.values(name) for name in names], dim=1)
        for name in names:
            del model.tensors[name]
        packed = Packed("F32", tuple(both.shape), both.numpy().tobytes())
        model.tensors[f"blk.{layer}.ffn_gate_up_exps.weight"] = packed
    together = opened(model, path)[1]
    assert set(together.names()) == set(apart.names())
    for name in apart.names():
        assert torch.equal(together.read(name), apart.read(name))


def test_keys_that_nobody_reads_are_named(path: Path) -> None:
    model = tiny("qwen2")
    assert not any("does not read" in notice for notice in opened(model, path)[0].notices)
    model.metadata["qwen2.attention.new_trick"] = 3
    assert any("attention.new_trick" in notice for notice in opened(model, path)[0].notices)

"""GGUF weights that stay packed: the same numbers as when they are unpacked, the same tokens alone and in any batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.functional import log_softmax

from fastqwen import LLM, SamplingParams
from fastqwen.build import build_decoder
from fastqwen.errors import BadCheckpoint
from fastqwen.kernels import StateRoom
from fastqwen.kernels.cpu import build
from fastqwen.kernels.cpu.ops import CpuOps
from fastqwen.kernels.reference import ReferenceOps, unpack_coded
from fastqwen.layers.decoder import Embedding, FileEmbedding
from fastqwen.layers.linear import DenseLinear, JoinedLinear, PackedLinear
from fastqwen.layers.moe import DenseExperts, Moe, PackedExperts
from fastqwen.model_config import ModelConfig
from fastqwen.plan.facts import DeviceFacts
from fastqwen.plan.weights import as_held, read_bytes, weights_bytes
from fastqwen.weights.gguf_checkpoint import GgufCheckpoint
from fastqwen.weights.gguf_config import config_from_gguf
from fastqwen.weights.gguf_file import GgufFile
from fastqwen.weights.gguf_types import TYPES
from fastqwen.weights.source import Weights
from tests.kernels.batches import one_prompt
from tests.weights.gguf_writer import random_tensor
from tests.weights.tiny_gguf import HIDDEN, TinyGguf, tiny

PACKED = [kind.name for kind in TYPES.values() if kind.split is not None]
CPU = torch.device("cpu")


def opened(model: TinyGguf, path: Path) -> GgufCheckpoint:
    file = GgufFile(model.write(path))
    return GgufCheckpoint(file, config_from_gguf(file))


@pytest.mark.parametrize("type_name", PACKED)
def test_codes_are_the_numbers_of_the_file(type_name: str, tmp_path: Path) -> None:
    """The embedding is made so wide that a row has whole blocks of every type; nobody computes with it here."""
    model = tiny("qwen3")
    model.tensors["token_embd.weight"] = random_tensor(type_name, (40, 512))
    checkpoint = opened(model, tmp_path / "tiny.gguf")
    codes, rows = checkpoint.codes("model.embed_tokens.weight"), checkpoint.rows("model.embed_tokens.weight")
    assert codes is not None and rows is not None
    whole = checkpoint.read("model.embed_tokens.weight")
    assert torch.equal(unpack_coded(codes), whole)
    assert int(codes.codes.max()) < 2**codes.bits
    assert torch.equal(rows(torch.tensor([3, 39, 0, 3])), whole[[3, 39, 0, 3]])
    assert checkpoint.codes("model.norm.weight") is None
    assert checkpoint.rows("model.norm.weight") is None


def test_queries_and_keys_of_llama_are_put_in_order(tmp_path: Path) -> None:
    checkpoint = opened(tiny("llama", "Q4_1"), tmp_path / "tiny.gguf")
    for letter in "qkvo":
        name = f"model.layers.1.self_attn.{letter}_proj.weight"
        codes = checkpoint.codes(name)
        assert codes is not None
        assert torch.equal(unpack_coded(codes), checkpoint.read(name))


@pytest.fixture(scope="module")
def ops() -> CpuOps:
    library = build.load()
    assert library is not None, "the tests need g++"
    return CpuOps(library)


def test_what_stays_packed(ops: CpuOps, tmp_path: Path) -> None:
    """In float32, and where there are no kernels, all is unpacked; queries, keys and values of one type are one matrix."""
    model = tiny("qwen3", "Q8_0")
    model.tensors["blk.1.attn_v.weight"] = random_tensor("Q4_0", (32, HIDDEN))
    checkpoint = opened(model, tmp_path / "tiny.gguf")
    config = config_from_gguf(GgufFile(tmp_path / "tiny.gguf"))
    packed = build_decoder(config, Weights(checkpoint, torch.bfloat16, CPU), ops)
    assert isinstance(packed.embed, FileEmbedding) and isinstance(packed.head, PackedLinear)
    first, second = (layer.mixer.qkv for layer in packed.layers)  # type: ignore[attr-defined]
    assert isinstance(first, PackedLinear)
    assert isinstance(second, JoinedLinear) and len(second.parts) == 2
    for plain_ops, dtype in ((ops, torch.float32), (ReferenceOps(), torch.bfloat16)):
        plain = build_decoder(config, Weights(checkpoint, dtype, CPU), plain_ops)
        assert isinstance(plain.embed, Embedding) and isinstance(plain.head, DenseLinear)


def test_a_scale_that_is_no_number_is_refused(ops: CpuOps, tmp_path: Path) -> None:
    model = tiny("qwen2", "Q4_0")
    tensor = model.tensors["blk.0.ffn_up.weight"]
    model.tensors["blk.0.ffn_up.weight"] = tensor._replace(data=b"\x00\x7c" + tensor.data[2:])  # infinity
    checkpoint = opened(model, tmp_path / "tiny.gguf")
    config = config_from_gguf(GgufFile(tmp_path / "tiny.gguf"))
    with pytest.raises(BadCheckpoint, match=r"up_proj.weight contains NaN or infinity"):
        build_decoder(config, Weights(checkpoint, torch.bfloat16, CPU), ops)


def test_the_demo_gives_the_same_tokens_alone_and_beside_others(demo_gguf: Path) -> None:
    llm = LLM(str(demo_gguf), dtype="bfloat16", max_num_seqs=8, max_num_batched_tokens=40, enable_prefix_caching=False)
    prompts = [
        list(range(start, start + length)) for start, length in ((500, 3), (900, 41), (4000, 17), (77, 90), (31, 1))
    ]
    kinds = [
        SamplingParams(temperature=index % 2, seed=index, max_tokens=12, logprobs=1) for index in range(len(prompts))
    ]
    together = llm.generate(prompts, kinds, use_tqdm=False)
    for ids, kind, found in zip(prompts, kinds, together, strict=True):
        [alone] = llm.generate([ids], kind, use_tqdm=False)
        assert alone.outputs[0].token_ids == found.outputs[0].token_ids
        assert alone.outputs[0].cumulative_logprob == found.outputs[0].cumulative_logprob


def test_memory_on_a_cpu_is_the_files(ops: CpuOps, demo_gguf: Path) -> None:
    file = GgufFile(demo_gguf)
    config = config_from_gguf(file)
    weights = Weights(GgufCheckpoint(file, config), torch.bfloat16, CPU)
    build_decoder(config, weights, ops)
    planned = weights_bytes(config, "bfloat16")
    assert abs(weights.num_bytes / planned - 1) < 0.02
    assert weights.num_bytes < 1.15 * demo_gguf.stat().st_size
    assert 0.9 * planned < read_bytes(config, "bfloat16", 1, 1) <= planned
    for kind, unpacks in (("cuda", False), ("cpu", True)):
        facts = DeviceFacts(kind=kind, name="", total_bytes=0, free_bytes=0, unpacks=unpacks)
        assert weights_bytes(as_held(config, facts), "bfloat16") > 2.5 * planned
    assert weights_bytes(config, "float32") > 5 * planned


@pytest.mark.parametrize("architecture", ["qwen2moe", "qwen3moe"])
@pytest.mark.parametrize("type_name", ["Q4_0", "Q5_1", "Q8_0"])
def test_experts_stay_packed(ops: CpuOps, architecture: str, type_name: str, tmp_path: Path) -> None:
    """They compute what the same experts compute in float32, but for the router's weights, and each token the same in any batch."""
    checkpoint = opened(tiny(architecture, type_name), tmp_path / "tiny.gguf")
    config = config_from_gguf(GgufFile(tmp_path / "tiny.gguf"))
    packed, plain = (
        build_decoder(config, Weights(checkpoint, dtype, CPU), ops).layers[1].feed_forward
        for dtype in (torch.bfloat16, torch.float32)
    )
    assert isinstance(packed, Moe) and isinstance(packed.experts, PackedExperts)
    assert isinstance(plain, Moe) and isinstance(plain.experts, DenseExperts)
    x, norm = torch.randn(13, HIDDEN), plain.norm
    step = one_prompt(config, 13)
    found, right = torch.zeros_like(x), torch.zeros_like(x)
    packed.experts.add_to(found, x, norm, step)
    plain.experts.add_to(right, x, norm, step)
    assert right.norm() > 0 and (found - right).norm() < 0.02 * right.norm()
    for size in (1, 4):
        alone = torch.zeros_like(x)
        for part, rows in zip(alone.split(size), x.split(size), strict=True):
            packed.experts.add_to(part, rows, norm, step)
        assert torch.equal(alone, found)


def test_gate_and_up_of_experts_in_one_tensor(tmp_path: Path) -> None:
    model = tiny("qwen3moe", "Q4_0")
    for layer in range(2):
        gate = model.tensors.pop(f"blk.{layer}.ffn_gate_exps.weight")
        del model.tensors[f"blk.{layer}.ffn_up_exps.weight"]
        both = random_tensor("Q4_0", (gate.shape[0], 2 * gate.shape[1], gate.shape[2]))
        model.tensors[f"blk.{layer}.ffn_gate_up_exps.weight"] = both
    checkpoint = opened(model, tmp_path / "tiny.gguf")
    for expert, part in ((0, "gate"), (2, "up"), (3, "down")):
        name = f"model.layers.1.mlp.experts.{expert}.{part}_proj.weight"
        codes = checkpoint.codes(name)
        assert codes is not None
        assert torch.equal(unpack_coded(codes), checkpoint.read(name))


def test_rounded_activations_change_no_answer(ops: CpuOps, demo_gguf: Path) -> None:
    """A product's 16 bits against float32: the same likeliest tokens, and predictions that are as good as equal."""
    file = GgufFile(demo_gguf)
    config = config_from_gguf(file)
    ids = torch.randint(1000, 40000, (48,), dtype=torch.int32, generator=torch.Generator().manual_seed(1))
    exact, rounded = (
        log_softmax(whole_prompt(ops, GgufCheckpoint(file, config), config, dtype, ids).double(), dim=-1)
        for dtype in (torch.float32, torch.bfloat16)
    )
    divergence = (exact.exp() * (exact - rounded)).sum(-1)
    assert 0 < divergence.max() < 1e-5
    assert torch.equal(exact.argmax(-1), rounded.argmax(-1))


def whole_prompt(
    ops: CpuOps, checkpoint: GgufCheckpoint, config: ModelConfig, dtype: torch.dtype, ids: torch.Tensor
) -> torch.Tensor:
    decoder = build_decoder(config, Weights(checkpoint, dtype, CPU), ops)
    states = decoder.make_states(StateRoom(1, len(ids), 1, torch.float32, CPU))
    return decoder.logits(decoder.hidden(ids, one_prompt(config, len(ids)), states))

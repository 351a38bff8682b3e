"""Damaged GGUF files end in one clear line: no other exception, no long wait, no great memory."""

from __future__ import annotations

import random
import struct
import time
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastqwen.build import build_decoder
from fastqwen.errors import FastqwenError
from fastqwen.kernels.reference import ReferenceOps
from fastqwen.text.gguf_tokenizer import tokenizer_from_gguf
from fastqwen.weights.gguf_checkpoint import GgufCheckpoint
from fastqwen.weights.gguf_config import config_from_gguf
from fastqwen.weights.gguf_file import GgufFile
from fastqwen.weights.source import Weights
from tests.weights.gguf_writer import Typed, gguf_bytes
from tests.weights.tiny_gguf import VOCAB, TinyGguf, tiny

EXTREMES = [0, 1, 2**7, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1]
MAX_SECONDS = 2.0
MAX_PEAK_BYTES = 32 * 2**20


def with_tokenizer(model: TinyGguf) -> TinyGguf:
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = [*letters, "ab", "abc", *(f"<|{number}|>" for number in range(VOCAB - 28))]
    types = [1] * 28 + [3] * (VOCAB - 28)
    model.metadata |= {
        "general.alignment": 32,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [Typed(5, kind) for kind in types],
        "tokenizer.ggml.merges": ["a b", "ab c"],
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": "{{ messages }}",
    }
    return model


def whole_files() -> list[tuple[bytes, int]]:
    """Each with the length of what stands before the tensors' bytes."""
    files = []
    for architecture in ("llama", "qwen2", "qwen2moe"):
        model = with_tokenizer(tiny(architecture, "Q4_0"))
        raw = gguf_bytes(model.metadata, model.tensors)
        padded = sum(-(-len(tensor.data) // 32) * 32 for tensor in model.tensors.values())
        files.append((raw, len(raw) - padded))
    return files


FILES = whole_files()


def use(path: Path) -> str:
    """All that starting with a model does to its file. The name of the error, or "whole"."""
    try:
        file = GgufFile(path)
        config = config_from_gguf(file)
        tokenizer_from_gguf(file.metadata, str(path)).encode("abc <|1|>")
        checkpoint = GgufCheckpoint(file, config)
        build_decoder(config, Weights(checkpoint, torch.float32, torch.device("cpu")), ReferenceOps())
    except FastqwenError as error:
        assert "\n" not in str(error)
        assert str(path) in str(error)
        assert len(str(error)) < 600
        return type(error).__name__
    return "whole"


def corrupted(raw: bytes, head: int, rng: random.Random) -> bytes:
    kind = rng.choice(["cut", "bits", "number", "remove", "insert", "swap"])
    at = rng.randrange(head)
    if kind == "cut":
        return raw[: rng.randrange(len(raw))]
    if kind == "bits":
        out = bytearray(raw)
        for _ in range(rng.randint(1, 4)):
            out[rng.randrange(head)] ^= 1 << rng.randrange(8)
        return bytes(out)
    if kind == "number":
        width, form = rng.choice([(8, "<Q"), (4, "<I")])
        return raw[:at] + struct.pack(form, rng.choice(EXTREMES) % 2 ** (8 * width)) + raw[at + width :]
    size = rng.randint(1, 40)
    if kind == "remove":
        return raw[:at] + raw[at + size :]
    if kind == "insert":
        return raw[:at] + rng.randbytes(size) + raw[at:]
    other = rng.randrange(head)
    return raw[:at] + raw[other : other + size] + raw[at + size :]


def test_the_whole_files_are_fine(tmp_path: Path) -> None:
    for raw, _ in FILES:
        (tmp_path / "whole.gguf").write_bytes(raw)
        assert use(tmp_path / "whole.gguf") == "whole"


@pytest.mark.parametrize("seed", range(6))
def test_a_hundred_damaged_files(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    path = tmp_path / "damaged.gguf"
    seen: Counter[str] = Counter()
    for _ in range(100):
        raw, head = rng.choice(FILES)
        path.write_bytes(corrupted(raw, head, rng))
        tracemalloc.start()
        start_s = time.monotonic()
        seen[use(path)] += 1
        assert time.monotonic() - start_s < MAX_SECONDS
        assert tracemalloc.get_traced_memory()[1] < MAX_PEAK_BYTES
        tracemalloc.stop()
    # A changed letter in a name or template may pass; most damage must not.
    assert seen["BadCheckpoint"] > seen["whole"]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=300), entries=st.integers(0, 3), tensors=st.integers(0, 2))
def test_noise_behind_a_right_beginning(tmp_path: Path, data: bytes, entries: int, tensors: int) -> None:
    path = tmp_path / "noise.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, tensors, entries) + data)
    use(path)


def test_no_number_in_the_file_can_ask_for_much(tmp_path: Path) -> None:
    """Every position before the tensors, with the worst counts; the file is small, so nothing may grow large."""
    raw, head = FILES[1]
    path = tmp_path / "worst.gguf"
    tracemalloc.start()
    for at in range(4, head, 7):
        for value in (2**32 - 1, 2**63):
            path.write_bytes(raw[:at] + struct.pack("<Q", value) + raw[at + 8 :])
            use(path)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < MAX_PEAK_BYTES


def test_scales_that_are_not_finite_are_named(tmp_path: Path) -> None:
    model = with_tokenizer(tiny("qwen2", "Q8_0"))
    tensor = model.tensors["blk.1.ffn_up.weight"]
    blocks = np.frombuffer(tensor.data, np.uint8).copy().reshape(-1, 34)
    blocks[5, :2] = np.frombuffer(np.float16(np.nan).tobytes(), np.uint8)
    model.tensors["blk.1.ffn_up.weight"] = tensor._replace(data=blocks.tobytes())
    file = GgufFile(model.write(tmp_path / "nan.gguf"))
    checkpoint = GgufCheckpoint(file, config_from_gguf(file))
    with pytest.raises(FastqwenError, match=r"model\.layers\.1\.mlp\.up_proj\.weight contains NaN or infinity"):
        Weights(checkpoint, torch.float32, torch.device("cpu")).tensor("model.layers.1.mlp.up_proj.weight", (96, 64))

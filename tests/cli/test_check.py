"""fastqwen check: what it says about a model, and how it ends."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models.tiny import make_qwen1


@pytest.fixture(scope="module")
def checkpoint(qwen_tiktoken: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen1")
    make_qwen1(folder, vocab_size=151936)
    (folder / "qwen.tiktoken").symlink_to(qwen_tiktoken)
    config = {"chat_format": "chatml", "eos_token_id": 151643, "top_p": 0.8, "repetition_penalty": 1.1}
    (folder / "generation_config.json").write_text(json.dumps(config))
    return folder


def variant(checkpoint: Path, folder: Path, change: Any) -> Path:
    """The same checkpoint with other weights."""
    for path in checkpoint.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).symlink_to(path)
    tensors = load_file(checkpoint / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fastqwen.cli.main", "check", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_json(checkpoint: Path):
    done = run(str(checkpoint), "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["model"] == str(checkpoint)
    assert (found["architecture"], found["dtype"], found["quantization"]) == ("qwen", "float32", None)
    assert found["max_model_len"] == 512
    assert found["chat_template"] == "built-in ChatML of Qwen-1"
    assert found["default_sampling"] == {"top_p": 0.8, "repetition_penalty": 1.1}
    assert found["stop_tokens"] == [
        {"id": 151643, "text": "<|endoftext|>", "origin": "generation_config.json: eos_token_id"},
        {"id": 151645, "text": "<|im_end|>", "origin": "generation_config.json: chat_format chatml"},
        {"id": 151644, "text": "<|im_start|>", "origin": "generation_config.json: chat_format chatml"},
    ]
    probe = found["probe"]
    assert (probe["finish_reason"], probe["num_tokens"], probe["ended_by"]) == ("length", 64, None)
    assert probe["answer"]


def test_the_table_says_the_same(checkpoint: Path):
    done = run(str(checkpoint), "--dtype", "bfloat16", "--max-model-len", "200")
    assert done.returncode == 0, done.stderr
    for words in ("qwen", "bfloat16", "200 tokens", "built-in ChatML", "top_p 0.8", "151645  <|im_end|>"):
        assert words in done.stdout
    assert "generation_config.json: chat_format chatml" in done.stdout
    assert "cut after 64 tokens" in done.stdout


def test_a_model_that_ends_by_itself(checkpoint: Path, tmp_path: Path):
    def always_im_end(tensors: dict[str, torch.Tensor]) -> None:
        norm, head = tensors["transformer.ln_f.weight"], tensors["lm_head.weight"]
        embedding = tensors["transformer.wte.weight"]
        head[151645] = 0
        embedding[:, 0], norm[0], head[151645, 0] = 50.0, 50.0, 50.0  # a channel that all tokens share

    found = json.loads(run(str(variant(checkpoint, tmp_path, always_im_end)), "--json").stdout)
    assert found["probe"]["finish_reason"] == "stop"
    assert found["probe"]["ended_by"] == {"id": 151645, "text": "<|im_end|>"}
    assert found["probe"]["num_tokens"] == 1 and found["probe"]["answer"] == ""


def test_a_model_that_overflows(checkpoint: Path, tmp_path: Path):
    def overflow(tensors: dict[str, torch.Tensor]) -> None:
        tensors["transformer.h.0.mlp.c_proj.weight"].fill_(3e38)

    done = run(str(variant(checkpoint, tmp_path, overflow)))
    assert done.returncode == 1
    assert "not finite" in done.stdout and "Traceback" not in done.stderr


@pytest.mark.parametrize("model", ["no/such/place", "/nonexistent"])
def test_no_model(model: str):
    done = run(model)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("fastqwen: ") and done.stderr.count("\n") == 1

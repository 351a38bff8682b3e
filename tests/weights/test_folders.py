"""A checkpoint's folder: which of its files are the model, what is done with tensors that nobody reads, what is said of the rest."""

from __future__ import annotations

import io
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from fastqwen.errors import FastqwenError
from tests.models.tiny import MOE, logits, make, prompt

IDS = prompt(20)
WHOLE = "model.safetensors"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}
    kinds: dict[str, tuple[str, dict[str, Any]]] = {
        "llama": ("LlamaConfig", {}),
        "qwen2": ("Qwen2Config", {}),
        "tied": ("Qwen2Config", {"tie_word_embeddings": True}),
        "qwen3": ("Qwen3Config", {"head_dim": 16}),
        "experts": ("Qwen3MoeConfig", {**MOE, "head_dim": 16}),
    }

    def find(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            make(made[name], kinds[name][0], **kinds[name][1])
        return made[name]

    return find


def changed(source: Path, folder: Path, change: Callable[[Tensors], Any]) -> Path:
    folder.mkdir(exist_ok=True)
    for file in source.iterdir():
        shutil.copy(file, folder)
    tensors = load_file(source / WHOLE)
    change(tensors)
    save_file(tensors, folder / WHOLE, {"format": "pt"})
    return folder


def found(folder: Path, caplog: pytest.LogCaptureFixture) -> tuple[torch.Tensor | None, str]:
    """(logits, what was told), or (None, the refusal)"""
    caplog.clear()
    caplog.set_level(logging.WARNING)
    try:
        return logits(folder, IDS), caplog.text
    except FastqwenError as error:
        return None, str(error)


def in_transformers(folder: Path) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        return model(torch.tensor([IDS])).logits[0]


QUIET = {
    "old-buffers": {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)},
    "biases-of-zeros": {"model.layers.0.mlp.up_proj.bias": torch.zeros(96)},
    "a-bias-of-zeros-of-the-head": {"lm_head.bias": torch.zeros(256)},
}
NAMED = {
    "heads-for-guessing": {"mtp.layers.0.mlp.up_proj.weight": torch.ones(2, 2)},
    "elsewhere": {"score.weight": torch.ones(2, 64)},
    "vision": {"visual.blocks.0.attn.qkv.weight": torch.ones(2, 2)},
    "more-layers": {"model.layers.7.mlp.up_proj.weight": torch.ones(96, 64)},
    "unknown-part": {"model.layers.0.foo.weight": torch.ones(2)},
    # Zeros, but not of a matrix: they may belong to a norm of another kind, or to a part that is not there.
    "a-norms-bias": {"model.layers.0.input_layernorm.bias": torch.zeros(64)},
    "a-bias-of-no-part": {"model.layers.0.foo.bias": torch.zeros(2)},
    "a-bias-of-the-embedding": {"model.embed_tokens.bias": torch.zeros(64)},
    "a-bias-of-routing": {"model.layers.0.mlp.gate.e_score_correction_bias": torch.zeros(4)},
    "a-bias-of-no-layer": {"model.layers.7.mlp.up_proj.bias": torch.zeros(96)},
}
REFUSED = {
    "a-bias-of-the-head": {"lm_head.bias": torch.ones(256)},
    "a-norms-bias-that-is-none": {"model.norm.bias": torch.ones(64)},
    "another-prefix": {"layers.0.mlp.up_proj.weight": torch.ones(96, 64)},
    "bias": {"model.layers.0.mlp.up_proj.bias": torch.ones(96)},
    "query-norm": {"model.layers.1.self_attn.q_norm.weight": torch.ones(16)},
    "adapter": {"model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 64)},
    "sinks": {"model.layers.0.self_attn.sinks": torch.ones(4)},
    "experts": {"model.layers.0.mlp.experts.0.up_proj.weight": torch.ones(4, 64)},
    "scales": {"model.layers.0.mlp.up_proj.weight_scale": torch.ones(1)},
}


@pytest.mark.parametrize("case", [*QUIET, *NAMED])
def test_tensors_that_change_nothing(
    case: str, models: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    extra = {**QUIET, **NAMED}[case]
    folder = changed(models("llama"), tmp_path / "m", lambda tensors: tensors.update(extra))
    values, told = found(folder, caplog)
    assert values is not None and torch.equal(values, logits(models("llama"), IDS))
    assert (next(iter(extra)) in told) == (case in NAMED), told


@pytest.mark.parametrize("case", REFUSED)
def test_tensors_that_would_change_the_answers(
    case: str, models: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    folder = changed(models("llama"), tmp_path / "m", lambda tensors: tensors.update(REFUSED[case]))
    values, told = found(folder, caplog)
    assert values is None and next(iter(REFUSED[case])) in told


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.from_regex(
        r"(model\.|lm_head\.|model\.layers\.[0-4]\.(self_attn\.|mlp\.)?)?[a-z]{1,6}(_proj|_norm)?\.(weight|bias)",
        fullmatch=True,
    )
)
def test_no_tensor_is_dropped_without_a_word(
    name: str, models: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    if name in load_file(models("qwen2") / WHOLE):
        return
    folder = changed(models("qwen2"), tmp_path / "m", lambda tensors: tensors.setdefault(name, torch.ones(3)))
    assert name in found(folder, caplog)[1]


@pytest.mark.parametrize("own_head", [False, True])
def test_a_head_beside_tied_embeddings(
    own_head: bool, models: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    def add_head(tensors: Tensors) -> None:
        tensors["lm_head.weight"] = (
            tensors["model.embed_tokens.weight"].flip(0) if own_head else tensors["model.embed_tokens.weight"].clone()
        )

    folder = changed(models("tied"), tmp_path / "m", add_head)
    values, told = found(folder, caplog)
    assert values is not None
    torch.testing.assert_close(values, in_transformers(folder), rtol=0, atol=1e-3)
    assert ("lm_head.weight" in told) == own_head


def test_a_tied_embedding_under_the_other_name(
    models: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    folder = changed(
        models("tied"),
        tmp_path / "m",
        lambda tensors: tensors.update({"lm_head.weight": tensors.pop("model.embed_tokens.weight")}),
    )
    values, told = found(folder, caplog)
    assert values is not None and torch.equal(values, logits(models("tied"), IDS)), told


def test_experts_in_one_tensor(models: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture):
    def stack(tensors: Tensors) -> None:
        for layer in range(3):
            prefix = f"model.layers.{layer}.mlp.experts."
            each = [
                {kind: tensors.pop(f"{prefix}{n}.{kind}_proj.weight") for kind in ("gate", "up", "down")}
                for n in range(8)
            ]
            tensors[f"{prefix}gate_up_proj"] = torch.stack([torch.cat([one["gate"], one["up"]]) for one in each])
            tensors[f"{prefix}down_proj"] = torch.stack([one["down"] for one in each])

    folder = changed(models("experts"), tmp_path / "m", stack)
    values, told = found(folder, caplog)
    assert values is not None and torch.equal(values, logits(models("experts"), IDS)), told


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "base_model.model."])
def test_foreign_prefixes(prefix: str, models: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture):
    def rename(tensors: Tensors) -> None:
        for name in list(tensors):
            tensors[prefix + name] = tensors.pop(name)

    told = found(changed(models("llama"), tmp_path / "m", rename), caplog)[1]
    assert "prefix" in told and prefix in told


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("self_attn.q_proj.base_layer.weight", "an adapter"),
        ("self_attn.qkv_proj.weight", "qkv_proj.weight is there, which is another program's layout"),
        ("self_attn.q_proj.gamma", "q_proj.gamma is there"),
        ("attention.q_proj.weight", "q_proj.weight is missing"),
    ],
)
def test_what_stands_in_a_missing_tensors_place(
    place: str, words: str, models: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    def rename(tensors: Tensors) -> None:
        tensors[f"model.layers.0.{place}"] = tensors.pop("model.layers.0.self_attn.q_proj.weight")

    values, told = found(changed(models("llama"), tmp_path / "m", rename), caplog)
    assert values is None and words in told


# ---- files ----


@pytest.mark.parametrize("other", [1.0, -1.0])
def test_a_tensor_in_two_files_is_the_later_one_and_told_if_they_differ(
    other: float, models: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    folder = changed(models("llama"), tmp_path / "m", lambda tensors: None)
    shard(folder)
    first, second = sorted(folder.glob("model-*.safetensors"))
    name, tensors = "model.norm.weight", {**load_file(first), **load_file(second)}
    holder, also = (first, second) if name in load_file(first) else (second, first)
    save_file({**load_file(also), name: other * tensors[name]}, also, {"format": "pt"})
    values, told = found(folder, caplog)
    assert values is not None
    torch.testing.assert_close(values, in_transformers(folder), rtol=0, atol=1e-3)
    assert (name in told) == (other < 0) and (holder.name in told) == (other < 0)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model.safetensors.incomplete", "unfinished download"), ("model.safetensors.part", "unfinished download"),
        ("model-00001-of-00002.safetensors.crdownload", "unfinished download"), ("tf_model.h5", "tf_model.h5"),
        ("model.onnx", "model.onnx"), ("MODEL.SAFETENSORS", "MODEL.SAFETENSORS"), ("pytorch_model.bin", "can run code"),
        ("checkpoint-5/model.safetensors", "checkpoint-5"), ("consolidated.safetensors", "only consolidated.safetensors"),
        ("._model.safetensors", "holds no .safetensors files"),
    ],
)  # fmt: skip
def test_what_a_folder_without_weights_holds_instead(
    name: str, words: str, models: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"x")
    shutil.copy(models("llama") / "config.json", tmp_path)
    assert words in found(tmp_path, caplog)[1]


PICKLED = io.BytesIO()
torch.save({"a": torch.ones(2)}, PICKLED)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (bytes(5000), "nothing but zeros"), (PICKLED.getvalue(), "can run code"), (b"GGUF" + bytes(600), "is a GGUF file"),
        (b"\x1f\x8b" + bytes(600), "gzip"), (b"", "is empty"),
    ],
    ids=["zeros", "pickled", "gguf", "gzip", "empty"],
)  # fmt: skip
def test_a_file_of_another_kind_says_what_it_is(
    data: bytes, words: str, models: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    folder = changed(models("llama"), tmp_path / "m", lambda tensors: None)
    (folder / WHOLE).write_bytes(data)
    assert words in found(folder, caplog)[1]


def test_a_download_that_has_not_ended(models: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture):
    folder = changed(models("llama"), tmp_path / "m", lambda tensors: None)
    whole = (folder / WHOLE).read_bytes()
    (folder / f"{WHOLE}.aria2").write_bytes(b"x")  # the file has its full length, and holes
    assert "unfinished download" in found(folder, caplog)[1]
    (folder / f"{WHOLE}.aria2").unlink()
    (folder / WHOLE).write_bytes(whole[: len(whole) // 2])
    assert "incomplete download" in found(folder, caplog)[1]
    (folder / WHOLE).unlink()
    (folder / WHOLE).symlink_to(tmp_path / "blob")
    assert "is a link to" in found(folder, caplog)[1]
    (folder / WHOLE).unlink()
    (folder / WHOLE).mkdir()
    assert "is a folder" in found(folder, caplog)[1]


@pytest.mark.parametrize(
    "name", ["a.safetensors", "zz.safetensors", "model-00001-of-00001.safetensors", "adapter_model.safetensors"]
)
@pytest.mark.parametrize("sharded", [False, True])
def test_another_file_does_not_answer_in_the_models_place(
    name: str, sharded: bool, models: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    folder = changed(models("llama"), tmp_path / "m", lambda tensors: None)
    if sharded:
        shard(folder)
    other = {key: tensor.flip(0) for key, tensor in load_file(models("llama") / WHOLE).items()}
    save_file(other, folder / name)
    values, told = found(folder, caplog)
    assert values is not None and torch.equal(values, logits(models("llama"), IDS))
    assert name in told


def shard(folder: Path, also: dict[str, str] | None = None) -> None:
    tensors = load_file(folder / WHOLE)
    (folder / WHOLE).unlink()
    names = sorted(tensors)
    where = {}
    for number, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        where |= dict.fromkeys(part, file)
    (folder / f"{WHOLE}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {**where, **(also or {})}}))


def test_an_index_that_lists_what_nobody_needs(
    models: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    folder = changed(models("tied"), tmp_path / "m", lambda tensors: None)
    unneeded = [
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "lm_head.weight",
        "ghost.weight",
        "model.layers.9.mlp.up_proj.weight",
        "model.layers.0.mlp.up_proj.bias",
    ]
    shard(folder, dict.fromkeys(unneeded, "model-00003-of-00003.safetensors"))
    values, told = found(folder, caplog)
    assert values is not None and torch.equal(values, logits(models("tied"), IDS)), told
    assert "ghost.weight" in told


def test_a_single_file_of_another_name_is_the_model(
    models: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    folder = changed(models("llama"), tmp_path / "m", lambda tensors: None)
    (folder / WHOLE).rename(folder / "my_model.safetensors")
    values, _ = found(folder, caplog)
    assert values is not None and torch.equal(values, logits(models("llama"), IDS))
    save_file({"x": torch.ones(1)}, folder / "other.safetensors")
    values, told = found(folder, caplog)
    assert values is None and "my_model.safetensors" in told and "other.safetensors" in told


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 3087467144\n"
HTML = "\n<!DOCTYPE html>\n<html><head><title>Access denied</title></head></html>\n"


@pytest.mark.parametrize("file", ["config.json", WHOLE, "generation_config.json"])
@pytest.mark.parametrize(
    ("text", "word"),
    [
        (LFS, "Git LFS pointer"), (HTML, "web page"), ("Entry not found", "'Entry not found'"),
        ("Invalid username or password.", "an error of the hub"),
    ],
)  # fmt: skip
def test_what_a_download_left_instead(
    file: str, text: str, word: str, models: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    folder = changed(models("llama"), tmp_path / "m", lambda tensors: None)
    (folder / file).write_text(text)
    from fastqwen.model_config import read_json

    told = found(folder, caplog)[1]
    if file == "generation_config.json":
        with pytest.raises(FastqwenError) as caught:
            read_json(folder / file)
        told = str(caught.value)
    assert word in told and file in told


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("model_index.json", "diffusers"), ("params.json", "own layout"), ("Modelfile", "Ollama"),
        ("snapshots/abc/config.json", "snapshots/abc does: give that folder"), ("x.GGUF", "x.GGUF"), ("readme", "no config.json"),
    ],
)  # fmt: skip
def test_what_a_folder_is_that_has_no_config_json(
    file: str, words: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text("{}")
    assert words in found(tmp_path, caplog)[1]


def test_an_adapter_beside_a_config_json(
    models: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    shutil.copy(models("llama") / "config.json", tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "Qwen/Qwen3-8B"}))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"x")
    told = found(tmp_path, caplog)[1]
    assert "adapter" in told and "Qwen/Qwen3-8B" in told


@pytest.mark.parametrize("file", ["config.json", WHOLE])
def test_files_of_another_user(
    file: str,
    models: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    folder = changed(models("llama"), tmp_path / "m", lambda tensors: None)
    if file == WHOLE:  # who runs the tests may read all files
        (folder / file).write_bytes(b"x")
        monkeypatch.setattr("os.access", lambda path, mode: Path(path).name != file)
    else:
        monkeypatch.setattr(Path, "read_bytes", denied)
    told = found(folder, caplog)[1]
    assert "cannot be read" in told and file in told


def denied(path: Path) -> bytes:
    raise PermissionError(13, "Permission denied")


def test_adapters_and_mlx(models: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "Qwen/Qwen2.5-7B-Instruct"}))
    told = found(adapter, caplog)[1]
    assert "adapter" in told and "Qwen/Qwen2.5-7B-Instruct" in told
    folder = changed(models("llama"), tmp_path / "m", lambda tensors: None)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "quantization": {"group_size": 64, "bits": 4}}))
    assert "MLX" in found(folder, caplog)[1]


def test_json_as_windows_editors_write_it(
    models: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    for encoding in ("utf-8-sig", "utf-16"):
        folder = changed(models("llama"), tmp_path / encoding, lambda tensors: None)
        text = (folder / "config.json").read_text()
        (folder / "config.json").write_bytes(text.replace("\n", "\r\n").encode(encoding))
        assert found(folder, caplog)[0] is not None

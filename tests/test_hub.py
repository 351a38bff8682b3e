"""Hub names: what is asked of which hub, and what is never fetched."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NoReturn

import huggingface_hub
import pytest

from fastqwen import hub
from fastqwen.errors import BadConfig, ModelNotFound, Unsupported
from fastqwen.hub import resolve


def info(names: list[str]) -> SimpleNamespace:
    """What a hub says of a repository with these files."""
    return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in names])


def unlisted(self: Any, name: str, **options: Any) -> NoReturn:
    raise OSError("no route to host")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, str, dict[str, Any]]]:
    """Downloads are recorded instead of done, of both hubs."""
    seen: list[tuple[str, str, dict[str, Any]]] = []

    def recorder(hub: str) -> Any:
        def snapshot_download(name: str, **options: Any) -> str:
            seen.append((hub, name, options))
            return str(tmp_path)

        return snapshot_download

    modelscope = ModuleType("modelscope")
    modelscope.snapshot_download = recorder("modelscope")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "modelscope", modelscope)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", recorder("hugging face"))
    monkeypatch.setattr(hub, "_check_served", lambda model, revision, cache: None)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unlisted)
    for name in ("FASTQWEN_USE_MODELSCOPE", "VLLM_USE_MODELSCOPE"):
        monkeypatch.delenv(name, raising=False)
    return seen


def test_hugging_face(calls: list[Any], tmp_path: Path):
    assert resolve("Qwen/Qwen-7B-Chat", revision="main") == tmp_path
    [(hub, name, options)] = calls
    assert (hub, name, options["revision"]) == ("hugging face", "Qwen/Qwen-7B-Chat", "main")
    assert {"*.safetensors", "*.json", "*.tiktoken", "*.jinja"} <= set(options["allow_patterns"])
    assert not any(pattern.endswith((".py", ".bin", ".pt", ".pth", "*")) for pattern in options["allow_patterns"])


@pytest.mark.parametrize("modelscope", ["0", "1"])
def test_a_folder_to_keep_models_in(calls: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, modelscope: str):
    monkeypatch.setenv("FASTQWEN_USE_MODELSCOPE", modelscope)
    resolve("Qwen/Qwen-7B-Chat", folder=str(tmp_path))
    resolve("Qwen/Qwen-7B-Chat")
    assert [options["cache_dir"] for _, _, options in calls] == [str(tmp_path), None]


def test_the_text_side_alone_fetches_no_weights(calls: list[Any]):
    resolve("Qwen/Qwen-7B-Chat", weights=False)
    assert "*.safetensors" not in calls[0][2]["allow_patterns"]


@pytest.mark.parametrize("variable", ["FASTQWEN_USE_MODELSCOPE", "VLLM_USE_MODELSCOPE"])
@pytest.mark.parametrize(("value", "hub"), [("1", "modelscope"), ("True", "modelscope"), ("0", "hugging face")])
def test_modelscope_by_environment(
    calls: list[Any], monkeypatch: pytest.MonkeyPatch, variable: str, value: str, hub: str
):
    monkeypatch.setenv(variable, value)
    resolve("Qwen/Qwen-7B-Chat")
    assert [call[0] for call in calls] == [hub]


def test_modelscope_that_is_not_installed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FASTQWEN_USE_MODELSCOPE", "1")
    monkeypatch.setitem(sys.modules, "modelscope", None)
    with pytest.raises(BadConfig, match=r"pip install 'fastqwen\[modelscope\]'"):
        resolve("Qwen/Qwen-7B-Chat")


@pytest.mark.parametrize("name", ["", "Qwen", "a/b/c", "../x", "Qwen/..", "Qwen/a b", "/no/such/folder", "x.gguf"])
def test_names_that_are_no_models(calls: list[Any], name: str):
    with pytest.raises(ModelNotFound):
        resolve(name)
    assert not calls


def test_a_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch):
    def unreachable(name: str, **options: Any) -> str:
        raise OSError("no route to host\nmore")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    monkeypatch.setattr(hub, "_check_served", lambda model, revision, cache: None)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unlisted)
    with pytest.raises(ModelNotFound, match="no route to host") as caught:
        resolve("Qwen/Qwen-7B-Chat")
    assert "\n" not in str(caught.value)


# ---- what is needed, once; GGUF files ----

SAFETENSORS = [
    "config.json", "tokenizer.json", "model.safetensors.index.json", "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors", "consolidated.safetensors", "onnx/model.safetensors", "onnx/config.json",
    "additional_chat_templates/tool_use.jinja", "pytorch_model.bin", "README.md", "consolidated-00001-of-00002.safetensors",
]  # fmt: skip
GGUF = [
    "README.md", "config.json", "X-Q4_K_M.gguf", "X-Q8_0.gguf", "X-UD-Q4_K_XL.gguf", "X-Q4_K_XL.gguf", "mmproj-F16.gguf",
    "BF16/X-BF16-00001-of-00002.gguf", "BF16/X-BF16-00002-of-00002.gguf",
]  # fmt: skip


def listing(monkeypatch: pytest.MonkeyPatch, names: list[str]) -> list[str]:
    """A hub with these files; the list of those that were fetched one by one."""
    fetched: list[str] = []

    def download(name: str, file: str, **options: Any) -> str:
        fetched.append(file)
        return f"/cache/{file}"

    monkeypatch.setattr(hub, "_check_served", lambda model, revision, cache: None)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda self, name, **options: info(names))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return fetched


def test_only_the_models_own_weights_are_fetched(calls: list[Any], monkeypatch: pytest.MonkeyPatch):
    listing(monkeypatch, SAFETENSORS)
    resolve("a/b")
    wanted = {name for name in SAFETENSORS if "/" not in name or name.endswith(".jinja")}
    wanted -= {"consolidated.safetensors", "consolidated-00001-of-00002.safetensors", "pytorch_model.bin", "README.md"}
    assert set(calls[-1][2]["allow_patterns"]) == wanted
    listing(monkeypatch, [*SAFETENSORS, "model.safetensors"])
    resolve("a/b")
    assert [name for name in calls[-1][2]["allow_patterns"] if name.endswith(".safetensors")] == ["model.safetensors"]


@pytest.mark.parametrize(
    ("choice", "files"),
    [
        ("Q4_K_M", ["X-Q4_K_M.gguf"]),
        ("q8_0", ["X-Q8_0.gguf"]),
        ("Q4_K_XL", ["X-Q4_K_XL.gguf"]),
        ("UD-Q4_K_XL", ["X-UD-Q4_K_XL.gguf"]),
        ("X-Q8_0.gguf", ["X-Q8_0.gguf"]),
        ("BF16", ["BF16/X-BF16-00001-of-00002.gguf", "BF16/X-BF16-00002-of-00002.gguf"]),
    ],
)
def test_one_gguf_file_is_fetched(choice: str, files: list[str], calls: list[Any], monkeypatch: pytest.MonkeyPatch):
    fetched = listing(monkeypatch, GGUF)
    assert resolve(f"a/X-GGUF:{choice}") == Path("/cache") / files[0]
    assert fetched == files and not calls


def test_gguf_files_to_choose_from_are_listed(calls: list[Any], monkeypatch: pytest.MonkeyPatch):
    listing(monkeypatch, GGUF)
    for name in ("a/X-GGUF", "a/X-GGUF:Q2_K"):
        with pytest.raises(ModelNotFound, match=r"a/X-GGUF:Q4_K_M, .*a/X-GGUF:Q8_0") as caught:
            resolve(name)
        assert "MMPROJ" not in str(caught.value)
    for name in ("a/X-GGUF", "a/X-GGUF:latest"):
        assert listing(monkeypatch, ["X-Q8_0.gguf"]) == [] and resolve(name) == Path("/cache/X-Q8_0.gguf")
    listing(monkeypatch, SAFETENSORS)
    with pytest.raises(ModelNotFound, match="no GGUF files"):
        resolve("a/b:Q4_K_M")


PARTS = [f"Q4_K_M/X-0000{n}-of-00002.gguf" for n in (1, 2)]
OTHERS = [*PARTS, "X.i1-IQ2_M.gguf", "X-F16.gguf", "imatrix.gguf", "a_Q6_K.gguf"]


@pytest.mark.parametrize(
    ("choice", "files"),
    [
        (PARTS[0].partition("/")[2], PARTS), (PARTS[1].partition("/")[2], PARTS), ("Q4_K_M", PARTS), ("X", PARTS),
        ("fp16", ["X-F16.gguf"]), ("iq2_m", ["X.i1-IQ2_M.gguf"]), ("Q6_K", ["a_Q6_K.gguf"]),
    ],
)  # fmt: skip
def test_what_people_call_a_gguf_file(choice: str, files: list[str]):
    assert hub.choose_gguf(OTHERS, "a/X-GGUF", choice) == files


def test_a_choice_that_is_listed_can_be_made():
    several = ["one-Q4_K_M.gguf", "two-Q4_K_M.gguf", "two-Q8_0.gguf"]
    for names in (OTHERS, several):
        for choice in (None, "Q4_K_M" if names is several else "nothing"):
            with pytest.raises(ModelNotFound, match="choose one: ") as caught:
                hub.choose_gguf(names, "a/X", choice)
            offered = [one.partition(":")[2] for one in str(caught.value).partition("choose one: ")[2].split(", ")]
            assert len(set(offered)) == len(offered) > 1 and not any("imatrix" in one.lower() for one in offered)
            for one in offered:
                hub.choose_gguf(names, "a/X", one)


def test_weights_that_are_packed_in_another_way_are_refused_before_they_are_fetched(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    packed = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    config = {"model_type": "qwen2", **sizes, "vocab_size": 256, "quantization_config": packed}
    (tmp_path / "config.json").write_text(json.dumps(config))
    asked: list[Any] = []

    def download(name: str, file: str, **options: Any) -> str:
        asked.append((file, options["cache_dir"]))
        return str(tmp_path / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda self, name, **options: info(["model.safetensors"]))
    with pytest.raises(Unsupported, match="bitsandbytes"):
        resolve("a/b", folder="models")
    assert asked == [("config.json", "models")]


def test_files_of_other_names(tmp_path: Path):
    for name in ("M.GGUF", "sha256-2bada8a7"):
        (tmp_path / name).write_bytes(b"GGUF" + bytes(20))
        assert resolve(str(tmp_path / name)) == tmp_path / name
    (tmp_path / "x.bin").write_text("version https://git-lfs.github.com/spec/v1\noid")
    with pytest.raises(ModelNotFound, match="Git LFS pointer"):
        resolve(str(tmp_path / "x.bin"))

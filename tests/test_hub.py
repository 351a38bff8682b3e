"""Hub names: what is asked of which hub, and what is never fetched."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import huggingface_hub
import pytest

from fastqwen import hub
from fastqwen.errors import BadConfig, ModelNotFound
from fastqwen.hub import resolve


def unlisted(self: Any, name: str, **options: Any) -> list[str]:
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
    monkeypatch.setattr(hub, "_check_served", lambda model, revision: None)
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", unlisted)
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
    monkeypatch.setattr(hub, "_check_served", lambda model, revision: None)
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", unlisted)
    with pytest.raises(ModelNotFound, match="no route to host") as caught:
        resolve("Qwen/Qwen-7B-Chat")
    assert "\n" not in str(caught.value)


# ---- what is needed, once; GGUF files ----

SAFETENSORS = [
    "config.json", "tokenizer.json", "model.safetensors.index.json", "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors", "consolidated.safetensors", "onnx/model.safetensors", "onnx/config.json",
    "additional_chat_templates/tool_use.jinja", "pytorch_model.bin", "README.md",
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

    monkeypatch.setattr(hub, "_check_served", lambda model, revision: None)
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda self, name, **options: names)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return fetched


def test_only_the_models_own_weights_are_fetched(calls: list[Any], monkeypatch: pytest.MonkeyPatch):
    listing(monkeypatch, SAFETENSORS)
    resolve("a/b")
    wanted = {name for name in SAFETENSORS if "/" not in name or name.endswith(".jinja")}
    wanted -= {"consolidated.safetensors", "pytorch_model.bin", "README.md"}
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
    assert listing(monkeypatch, ["X-Q8_0.gguf"]) == [] and resolve("a/X-GGUF") == Path("/cache/X-Q8_0.gguf")
    listing(monkeypatch, SAFETENSORS)
    with pytest.raises(ModelNotFound, match="no GGUF files"):
        resolve("a/b:Q4_K_M")


def test_files_of_other_names(tmp_path: Path):
    for name in ("M.GGUF", "sha256-2bada8a7"):
        (tmp_path / name).write_bytes(b"GGUF" + bytes(20))
        assert resolve(str(tmp_path / name)) == tmp_path / name
    (tmp_path / "x.bin").write_text("version https://git-lfs.github.com/spec/v1\noid")
    with pytest.raises(ModelNotFound, match="Git LFS pointer"):
        resolve(str(tmp_path / "x.bin"))

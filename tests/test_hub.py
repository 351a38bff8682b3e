"""Hub names: what is asked of which hub, and what is never fetched."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import huggingface_hub
import pytest

from fastqwen.errors import BadConfig, ModelNotFound
from fastqwen.hub import resolve


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
    for name in ("FASTQWEN_USE_MODELSCOPE", "VLLM_USE_MODELSCOPE"):
        monkeypatch.delenv(name, raising=False)
    return seen


def test_hugging_face(calls: list[Any], tmp_path: Path):
    assert resolve("Qwen/Qwen-7B-Chat", revision="main") == tmp_path
    [(hub, name, options)] = calls
    assert (hub, name, options["revision"]) == ("hugging face", "Qwen/Qwen-7B-Chat", "main")
    assert {"*.safetensors", "*.json", "*.tiktoken", "*.jinja"} <= set(options["allow_patterns"])
    assert not any(pattern.endswith((".py", ".bin", ".pt", ".pth", "*")) for pattern in options["allow_patterns"])


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
    with pytest.raises(ModelNotFound, match="no route to host") as caught:
        resolve("Qwen/Qwen-7B-Chat")
    assert "\n" not in str(caught.value)

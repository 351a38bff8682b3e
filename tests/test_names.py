"""What people call a model, and what it stands for: without asking a hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NoReturn

import huggingface_hub
import pytest
from huggingface_hub.errors import EntryNotFoundError

from fastqwen.errors import FastqwenError, ModelNotFound, Unsupported
from fastqwen.hub import resolve
from fastqwen.names import advice, hub_address, known_name, nearest
from fastqwen.plan.catalog import catalog
from tests.server.live import one_line, run


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("demo", "demo"),
        ("Qwen/Qwen3-8B", "Qwen/Qwen3-8B"),
        ("qwen/qwen3-8b", "Qwen/Qwen3-8B"),
        ("Qwen3-8B", "Qwen/Qwen3-8B"),
        ("qwen2.5-7b-instruct", "Qwen/Qwen2.5-7B-Instruct"),
        ("Qwen-7B-Chat-Int4", "Qwen/Qwen-7B-Chat-Int4"),
        ("qwen3:8b", "Qwen/Qwen3-8B"),
        ("qwen3:0.6b", "Qwen/Qwen3-0.6B"),
        ("qwen3:30b", "Qwen/Qwen3-30B-A3B"),
        ("qwen3:30b-a3b-instruct-2507", "Qwen/Qwen3-30B-A3B-Instruct-2507"),
        ("qwen3:8b-fp16", "Qwen/Qwen3-8B"),
        ("qwen3:8b-q4_K_M", "Qwen/Qwen3-8B-GGUF:Q4_K_M"),
        ("qwen2.5:7b", "Qwen/Qwen2.5-7B-Instruct"),
        ("qwen2.5-coder:7b-instruct-q8_0", "Qwen/Qwen2.5-Coder-7B-Instruct-GGUF:Q8_0"),
        ("qwen2.5-coder:7b-base", "Qwen/Qwen2.5-Coder-7B"),
        ("qwen:7b", "Qwen/Qwen1.5-7B-Chat"),
        ("qwq", "Qwen/QwQ-32B"),
        ("qwq:32b", "Qwen/QwQ-32B"),
        ("Qwen3-8B:Q4_K_M", "Qwen/Qwen3-8B-GGUF:Q4_K_M"),
        ("Qwen3-8B-GGUF", "Qwen/Qwen3-8B-GGUF"),
        ("Qwen3-Embedding-0.6B", "Qwen/Qwen3-Embedding-0.6B"),
        ("owner/name", "owner/name"),
        ("owner/name:Q4_K_M", "owner/name:Q4_K_M"),
        ("Qwen/Qwen9-1B", "Qwen/Qwen9-1B"),
        ("https://huggingface.co/Qwen/Qwen3-8B", "Qwen/Qwen3-8B"),
        ("https://huggingface.co/Qwen/Qwen3-8B/tree/main", "Qwen/Qwen3-8B"),
        ("huggingface.co/owner/name/blob/main/config.json", "owner/name"),
        ("https://huggingface.co/owner/x-GGUF/resolve/main/x-Q5_K_M.gguf", "owner/x-GGUF:Q5_K_M"),
        ("hf.co/owner/x-GGUF:Q4_K_M", "owner/x-GGUF:Q4_K_M"),
        ("owner/x-GGUF/x-Q4_K_M.gguf", "owner/x-GGUF:x-Q4_K_M.gguf"),
        ("owner/x-GGUF/Q4_K_M/x-00001-of-00002.gguf", "owner/x-GGUF:x-00001-of-00002.gguf"),
        ("https://huggingface.co/owner/x-GGUF/tree/main/Q4_K_M", "owner/x-GGUF:Q4_K_M"),
        (
            "https://huggingface.co/owner/x-GGUF/blob/main/Q8_0/x-00001-of-00002.gguf",
            "owner/x-GGUF:x-00001-of-00002.gguf",
        ),
        ("https://huggingface.co/owner/x-GGUF?show_file_info=x-Q4_0.gguf", "owner/x-GGUF:Q4_0"),
        ("registry.ollama.ai/library/qwen3:8b", "Qwen/Qwen3-8B"),
        ("hf://Qwen/Qwen3-8B", "Qwen/Qwen3-8B"),
        ("https://modelscope.cn/models/Qwen/Qwen3-8B/summary", "Qwen/Qwen3-8B"),
        ("https://ollama.com/library/qwen3:8b", "Qwen/Qwen3-8B"),
    ],
)
def test_one_name_for_what_people_type(typed: str, name: str):
    assert known_name(typed) == name
    assert known_name(name) == name, "a known name stands for itself"


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        ("qwen3", "family of models, so name one of them (Qwen/Qwen3-0.6B, "),
        ("qwen2.5-coder:latest", "Qwen/Qwen2.5-Coder-7B-Instruct, "),
        ("Qwen3-9B", "the nearest names are Qwen/Qwen3.5-9B, Qwen/Qwen3-8B, "),
        ("qwen3:9b", "the nearest names are Qwen/Qwen3.5-9B, Qwen/Qwen3-8B, "),
        ("llama3:8b", "others have a hub name, OWNER/NAME"),
        ("", "is empty"),
        ("Qwen/..", "neither a folder"),
        ("https://huggingface.co/Qwen/Qwen3-8B/tree/v2", "Qwen/Qwen3-8B --revision v2"),
        ("https://huggingface.co/datasets/a/b", "no model's address"),
        ("http://localhost:8000", "fastqwen chat http://localhost:8000"),
        ("/no/such/place", "no folder /no/such"),
        ("~nobody/model", "no folder"),
        ("a" * 5000, "no folder"),
    ],
)
def test_what_is_no_model_is_one_line_that_helps(typed: str, says: str):
    with pytest.raises(ModelNotFound) as caught:
        known_name(typed)
    assert says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        ("Qwen/Qwen2.5-VL-7B-Instruct", "reads images"),
        ("qwen2.5vl:7b", "reads images"),
        ("QVQ-72B-Preview", "reads images"),
        ("Qwen2-Audio-7B", "listens"),
        ("Qwen/Qwen3-Omni-30B-A3B-Instruct", "reads images and listens"),
        ("Qwen-Image", "makes images"),
    ],
)
def test_models_that_are_not_served_are_said_to_be_so(typed: str, says: str):
    with pytest.raises(Unsupported, match=says):
        known_name(typed)


def test_what_the_catalogue_calls_not_served_is_refused_under_each_of_its_names():
    later = catalog().not_served[0].name
    for typed in (later, later.removeprefix("Qwen/"), later.lower(), f"{later}-FP8"):
        with pytest.raises(Unsupported, match="not served yet"):
            known_name(typed)


def test_a_path_that_is_not_there_names_what_lies_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "my-checkpoint").mkdir()
    (tmp_path / "model.Q4_0.gguf").touch()
    monkeypatch.chdir(tmp_path)
    assert known_name("./my-checkpoint") == "./my-checkpoint"
    for typed, beside in (("./my-chekpoint", "my-checkpoint"), ("model.gguf", "model.Q4_0.gguf"), ("./zzz", "nothing")):
        with pytest.raises(ModelNotFound) as caught:
            known_name(typed)
        assert beside in str(caught.value)


@pytest.mark.parametrize("command", ["serve", "chat", "generate", "check", "plan", "bench latency"])
@pytest.mark.parametrize("model", ["./missing", "qwen3"])
def test_each_command_says_it_in_one_line(command: str, model: str):
    assert model in one_line(run(*command.split(), model))


def test_published_names_are_near_to_themselves():
    for entry in catalog().models:
        assert nearest(entry.name)[0] == entry.name
        assert advice(entry.name) == "", "what exists needs no advice"
    assert "Qwen/Qwen3-8B" in advice("Qwen/Qwen3-9B")
    assert advice("owner/name") == ""


def test_addresses_of_hubs_are_not_those_of_servers():
    assert hub_address("https://huggingface.co/Qwen/Qwen3-8B") and hub_address("hf.co/a/b")
    assert not hub_address("http://localhost:8000") and not hub_address("http://my-huggingface.co.example")


def test_an_architecture_that_is_not_served_is_found_before_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"model_type": "mamba", "architectures": ["MambaForCausalLM"]}))
    fetched: list[str] = []

    def unlisted(*_: object, **__: object) -> NoReturn:
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unlisted)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: str(config))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: fetched.append(name) or str(tmp_path))
    with pytest.raises(Unsupported, match="mamba"):
        resolve("someone/else")
    assert not fetched

    def none(*_: object, **__: object) -> str:
        raise EntryNotFoundError("404")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", none)
    assert resolve("someone/with-no-config") == tmp_path and fetched == ["someone/with-no-config"]


def test_every_error_is_one_of_ours():
    for typed in (
        "\x00",
        "%",
        "é",
        "a b",
        "::",
        "qwen3:",
        ":8b",
        "https://",
        "https://huggingface.co",
        "hf://",
        "https://[::1",
    ):
        with pytest.raises(FastqwenError):
            known_name(typed)


def test_a_name_with_more_than_there_is_leads_to_what_there_is():
    assert nearest("Qwen3-8b-instruct")[0] == "Qwen/Qwen3-8B"
    assert nearest("qwen3-4b-instruct-2507-gguf")[0] == "Qwen/Qwen3-4B-Instruct-2507"

"""From what the user calls a model to files on this machine: the demo, a folder, a .gguf file, or a hub name."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastqwen.config import EngineConfig
from fastqwen.demo import demo_path
from fastqwen.errors import BadConfig, ModelNotFound
from fastqwen.model_config import ModelConfig, read_json
from fastqwen.models import parse_config
from fastqwen.names import DEMO, advice, is_hub_name, known_name
from fastqwen.plan.catalog import published
from fastqwen.weights.checkpoint import open_checkpoint

# Pickled weights and a checkpoint's code are never fetched: nothing here would run them.
WANTED_FILES = ["*.safetensors", "*.json", "*.jinja", "*.tiktoken", "merges.txt", "vocab.txt"]


def resolve(model: str, *, revision: str | None = None, weights: bool = True) -> Path:
    """The folder or .gguf file of a model, fetched if need be. ``weights=False`` leaves the large files out.

    Raises ModelNotFound, saying what to do, and BadCheckpoint if the demo's file is not the expected one.
    """
    model = known_name(model)
    path = Path(model).expanduser()
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if path.is_file():
        raise ModelNotFound(f"{model} is a file, but not a .gguf file: give the folder that holds config.json")
    if model == DEMO:
        return demo_path()
    if not is_hub_name(model):
        raise ModelNotFound(f"{model!r} is not a hub name like Qwen/Qwen3-0.6B")
    if use_modelscope():
        return _from_modelscope(model, revision, weights)
    return _from_hugging_face(model, revision, weights)


def find_checkpoint(config: EngineConfig) -> tuple[Path, ModelConfig]:
    """Where the configured model lies, fetched if need be, and what it says of itself. Raises as ``resolve`` does."""
    path = resolve(config.model, revision=config.revision, weights=config.load_format != "dummy")
    return path, open_checkpoint(path, with_tensors=False).model


def use_modelscope() -> bool:
    """Whether an environment variable, fastqwen's or the one that Qwen's guides name, asks for ModelScope."""
    return any(
        os.environ.get(name, "").lower() in ("1", "true", "yes")
        for name in ("FASTQWEN_USE_MODELSCOPE", "VLLM_USE_MODELSCOPE")
    )


def _from_hugging_face(model: str, revision: str | None, weights: bool) -> Path:
    from huggingface_hub import snapshot_download

    if weights and published(model) is None:
        _check_served(model, revision)
    with _hub_errors(model, revision):
        return Path(snapshot_download(model, revision=revision, allow_patterns=_wanted_files(weights)))


def _check_served(model: str, revision: str | None) -> None:
    """Raises Unsupported for an architecture that is not served, before gigabytes of its weights are fetched."""
    file = _config_file(model, revision)
    if file is not None:
        parse_config(read_json(file), f"{model}: config.json")


def config_from_hub(model: str) -> dict[str, Any]:
    """Only config.json, from the cache or the hub. Raises ModelNotFound, saying what to do."""
    file = _config_file(model, None)
    if file is None:
        raise ModelNotFound(f"{model} holds no config.json, which says what sizes it has")
    return read_json(file)


def _config_file(model: str, revision: str | None) -> Path | None:
    """None: the repository has none, as those that hold only .gguf files."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    with _hub_errors(model, revision):
        try:
            return Path(hf_hub_download(model, "config.json", revision=revision))
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError:
            return None


@contextmanager
def _hub_errors(model: str, revision: str | None = None) -> Iterator[None]:
    """What the hub's client raises as ModelNotFound that says what to do."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        yield
    except GatedRepoError:
        raise ModelNotFound(f"{model} asks for an account: accept its terms on the hub and set HF_TOKEN") from None
    except RepositoryNotFoundError:
        raise ModelNotFound(
            f"there is no model {model!r} on the hub (a private one needs HF_TOKEN){advice(model)}"
        ) from None
    except RevisionNotFoundError:
        raise ModelNotFound(f"{model} has no revision {revision!r}") from None
    except Exception as error:  # the client raises its own errors and those of whichever HTTP library it uses
        raise ModelNotFound(
            f"{model} is not in the cache and the hub cannot be reached ({_first_line(error)}): check the network, "
            f"HF_ENDPOINT and HF_HUB_OFFLINE, or give a local folder; `demo` is a model that needs no hub{advice(model)}"
        ) from None


def _wanted_files(weights: bool) -> list[str]:
    return [pattern for pattern in WANTED_FILES if weights or pattern != "*.safetensors"]


def _from_modelscope(model: str, revision: str | None, weights: bool) -> Path:
    try:
        from modelscope import snapshot_download
    except ImportError:
        raise BadConfig("ModelScope is asked for, but not installed: pip install 'fastqwen[modelscope]'") from None
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=_wanted_files(weights)))
    except Exception as error:  # modelscope raises many types; each means that the model is not there
        raise ModelNotFound(f"ModelScope could not give {model}: {_first_line(error)}") from None


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]

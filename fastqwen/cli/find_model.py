"""From what the user calls a model to its sizes, without its weights: a folder, a GGUF file, a published or a hub name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from fastqwen.errors import ModelNotFound
from fastqwen.hub import DEMO, demo_path
from fastqwen.model_config import read_json
from fastqwen.models import parse_config, read_config
from fastqwen.plan.catalog import Found, find_published

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def find_model(text: str) -> Found:
    """Raises ModelNotFound, BadCheckpoint or Unsupported."""
    path = demo_path() if text == DEMO else Path(text).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return _from_gguf(path, text)
    if path.is_dir():
        return Found(model=read_config(path), name=text)
    found = find_published(text)
    if found is not None:
        return found
    if not _HUB_NAME.fullmatch(text) or ".." in text:
        raise ModelNotFound(
            f"there is no folder, .gguf file or published Qwen model {text!r}, and it is not a hub name like Qwen/Qwen3-8B"
        )
    return Found(model=parse_config(_hub_config(text), f"{text}: config.json"), name=text)


def _from_gguf(path: Path, text: str) -> Found:
    """Only the file's header is read. Loading unpacks the weights, so the file's own size does not matter."""
    from fastqwen.weights.gguf_checkpoint import config_from_gguf
    from fastqwen.weights.gguf_file import GgufFile

    notices = ("the file's weights are unpacked when they are loaded",)
    return Found(model=config_from_gguf(GgufFile(path)), name=text, notices=notices)


def _hub_config(name: str) -> dict[str, Any]:
    """Only config.json, from the cache or the hub. Raises ModelNotFound, saying what to do."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        path = hf_hub_download(name, "config.json")
    except GatedRepoError:
        raise ModelNotFound(f"{name} asks for an account: accept its terms on the hub and set HF_TOKEN") from None
    except RepositoryNotFoundError:
        raise ModelNotFound(f"there is no model {name!r} on the hub (a private one needs HF_TOKEN)") from None
    except Exception as error:  # the hub's client raises its own errors and those of whichever HTTP library it uses
        reason = (str(error).splitlines() or [type(error).__name__])[0].split(". ")[0][:200]
        raise ModelNotFound(
            f"{name}: config.json is not in the cache and the hub cannot be reached ({reason}): "
            "check the network, HF_ENDPOINT and HF_HUB_OFFLINE, or give a local folder"
        ) from None
    return read_json(Path(path))

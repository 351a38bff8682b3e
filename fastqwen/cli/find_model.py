"""From what the user calls a model to its sizes, without its weights: a folder, a GGUF file, a published or a hub name."""

from __future__ import annotations

from pathlib import Path

from fastqwen.errors import ModelNotFound
from fastqwen.hub import DEMO, config_from_hub, demo_path, is_hub_name
from fastqwen.models import parse_config, read_config
from fastqwen.paths import check_regular
from fastqwen.plan.catalog import NamedModel, find_published


def find_model(text: str) -> NamedModel:
    """Raises ModelNotFound, BadCheckpoint or Unsupported."""
    path = demo_path() if text == DEMO else Path(text).expanduser()
    if path.exists():
        check_regular(path)
    if path.suffix == ".gguf" and path.is_file():
        return _from_gguf(path, text)
    if path.is_dir():
        return NamedModel(model=read_config(path), name=text)
    found = find_published(text)
    if found is not None:
        return found
    if not is_hub_name(text):
        raise ModelNotFound(
            f"there is no folder, .gguf file or published Qwen model {text!r}, and it is not a hub name like Qwen/Qwen3-8B"
        )
    return NamedModel(model=parse_config(config_from_hub(text), f"{text}: config.json"), name=text)


def _from_gguf(path: Path, text: str) -> NamedModel:
    """Only the file's header is read. Loading unpacks the weights, so the file's own size does not matter."""
    from fastqwen.weights.gguf_checkpoint import config_from_gguf
    from fastqwen.weights.gguf_file import GgufFile

    notices = ("the file's weights are unpacked when they are loaded",)
    return NamedModel(model=config_from_gguf(GgufFile(path)), name=text, notices=notices)

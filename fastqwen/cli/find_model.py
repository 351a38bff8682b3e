"""From what the user calls a model to its sizes, without its weights: a folder, a GGUF file, a published or a hub name."""

from __future__ import annotations

from pathlib import Path

from fastqwen.demo import demo_path
from fastqwen.errors import BadCheckpoint, ModelNotFound
from fastqwen.hub import config_from_hub, resolve
from fastqwen.models import parse_config, read_config
from fastqwen.names import DEMO, is_hub_name, known_name, split_hub_name
from fastqwen.paths import check_regular
from fastqwen.plan.catalog import NamedModel, find_published
from fastqwen.weights.refusals import check_folder


def find_model(text: str) -> NamedModel:
    """Raises ModelNotFound, BadCheckpoint or Unsupported."""
    text = known_name(text)
    path = demo_path() if text == DEMO else Path(text).expanduser()
    if path.exists():
        check_regular(path)
    if path.is_file():
        return _from_gguf(resolve(text), text)
    if path.is_dir():
        check_folder(path)
        return NamedModel(model=read_config(path), name=text)
    found = find_published(text)
    if found is not None:
        return found
    if not is_hub_name(text):
        raise ModelNotFound(f"{text!r} is not a hub name like Qwen/Qwen3-8B")
    if split_hub_name(text)[1] is not None:
        raise ModelNotFound(f"{text} is a GGUF file on the hub, of which the planner reads the header: fetch it first")
    return NamedModel(model=parse_config(config_from_hub(text), f"{text}: config.json"), name=text)


def _from_gguf(path: Path, text: str) -> NamedModel:
    """Only the file's header is read. Loading unpacks the weights, so the file's own size does not matter."""
    from fastqwen.text.gguf_tokenizer import kind_of_words
    from fastqwen.weights.gguf_checkpoint import GgufCheckpoint
    from fastqwen.weights.gguf_config import config_from_gguf
    from fastqwen.weights.gguf_file import GgufFile

    file = GgufFile(path)
    model = config_from_gguf(file)
    GgufCheckpoint(file, model)  # refuses, as serve does, tensors that have no place
    notices: tuple[str, ...] = ("the file's weights are unpacked when they are loaded",)
    try:
        kind_of_words(file.metadata, str(path))
    except BadCheckpoint as error:
        notices += (f"serve needs --tokenizer: {error}",)
    return NamedModel(model=model, name=text, notices=notices)

"""A model's files, opened: what it is, and where its tensors are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from fastqwen.errors import ModelNotFound
from fastqwen.model_config import ModelConfig
from fastqwen.models import quantization_source, read_config

if TYPE_CHECKING:  # it needs torch, and reading a configuration does not
    from fastqwen.weights.source import TensorFile


@dataclass(frozen=True)
class Checkpoint:
    model: ModelConfig
    source: str  # the file that says how the weights are stored; errors name it
    tensors: TensorFile | None  # None: only the configuration was asked for


def open_checkpoint(
    path: Path, *, with_tensors: bool = True, overrides: Mapping[str, Any] = MappingProxyType({})
) -> Checkpoint:
    """``path`` is a folder with config.json and safetensors, or a .gguf file; ``overrides`` replace keys of config.json.

    Raises BadCheckpoint or ModelNotFound.
    """
    if path.suffix == ".gguf" and path.is_file():
        from fastqwen.weights.gguf_checkpoint import GgufCheckpoint, config_from_gguf
        from fastqwen.weights.gguf_file import GgufFile

        file = GgufFile(path)
        model = config_from_gguf(file, overrides)
        return Checkpoint(model, str(path), GgufCheckpoint(file, model) if with_tensors else None)
    if not (path / "config.json").is_file():
        ggufs = sorted(file.name for file in path.glob("*.gguf"))
        hint = f": give the file itself, for example {path / ggufs[0]}" if ggufs else ""
        raise ModelNotFound(f"{path} holds no config.json{hint}")
    model = read_config(path, overrides)
    source = str(quantization_source(path))
    if not with_tensors:
        return Checkpoint(model, source, None)
    from fastqwen.weights.safetensors_file import SafetensorsCheckpoint

    return Checkpoint(model, source, SafetensorsCheckpoint(path))

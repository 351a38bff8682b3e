"""A model's files, opened: what it is, and where its tensors are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

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

    @property
    def tensor_files(self) -> set[Path]:
        return set() if self.tensors is None else {Path(self.tensors.location(name)) for name in self.tensors.names()}


def open_checkpoint(path: Path, *, with_tensors: bool = True) -> Checkpoint:
    """``path`` is a folder with config.json and safetensors, or a .gguf file. Raises BadCheckpoint or ModelNotFound."""
    if path.suffix == ".gguf" and path.is_file():
        from fastqwen.weights.gguf_checkpoint import GgufCheckpoint, config_from_gguf
        from fastqwen.weights.gguf_file import GgufFile

        file = GgufFile(path)
        model = config_from_gguf(file)
        return Checkpoint(model, str(path), GgufCheckpoint(file, model) if with_tensors else None)
    if not (path / "config.json").is_file():
        ggufs = sorted(file.name for file in path.glob("*.gguf"))
        hint = f": give the file itself, for example {path / ggufs[0]}" if ggufs else ""
        raise ModelNotFound(f"{path} holds no config.json{hint}")
    model = read_config(path)
    source = str(quantization_source(path))
    if not with_tensors:
        return Checkpoint(model, source, None)
    from fastqwen.weights.safetensors_file import SafetensorsCheckpoint

    return Checkpoint(model, source, SafetensorsCheckpoint(path))

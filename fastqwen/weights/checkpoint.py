"""A model's files, opened: what it is, and where its tensors are."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from fastqwen.model_config import ModelConfig
from fastqwen.models import quantization_source, read_config
from fastqwen.weights.refusals import check_folder

log = logging.getLogger(__name__)

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


def open_checkpoint(
    path: Path, *, with_tensors: bool = True, overrides: Mapping[str, Any] = MappingProxyType({})
) -> Checkpoint:
    """``path`` is a folder with config.json and safetensors, or a .gguf file; ``overrides`` replace keys of config.json.

    Raises BadCheckpoint or ModelNotFound.
    """
    if path.is_file():
        from fastqwen.weights.gguf_checkpoint import GgufCheckpoint
        from fastqwen.weights.gguf_config import config_from_gguf
        from fastqwen.weights.gguf_file import GgufFile

        file = GgufFile(path)
        model = config_from_gguf(file, overrides)
        return Checkpoint(model, str(path), GgufCheckpoint(file, model) if with_tensors else None)
    check_folder(path)
    model = read_config(path, overrides)
    source = str(quantization_source(path))
    if not with_tensors:
        return Checkpoint(model, source, None)
    return Checkpoint(model, source, _open_folder(path, model))


def _open_folder(folder: Path, model: ModelConfig) -> TensorFile:
    from fastqwen.weights.accounting import check_lacking
    from fastqwen.weights.safetensors_file import SafetensorsCheckpoint

    found = SafetensorsCheckpoint(folder, (model.quantization or {}).get("model_file_base_name"))
    check_lacking(found.lacking, model)
    if found.unused_files:
        log.warning("%s: not read, for they are not the model's own: %s", folder, ", ".join(found.unused_files[:8]))
    return found

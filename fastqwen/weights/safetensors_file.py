"""safetensors checkpoints, single or sharded with an index. The files are mapped, not read."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastqwen.errors import BadCheckpoint, ModelNotFound, Unsupported
from fastqwen.model_config import read_json
from fastqwen.sharding import Part
from fastqwen.weights.source import cut

INDEX = "model.safetensors.index.json"


class SafetensorsCheckpoint:
    """Raises BadCheckpoint for a damaged or missing file, Unsupported where only pickled weights are there."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[Path, safe_open] = {}
        self._file_of: dict[str, Path] = {}
        for path in _shards(folder):
            self._files[path] = _open(path)
            for name in self._files[path].keys():
                self._file_of[name] = path
        self._check_index()

    def names(self) -> list[str]:
        return list(self._file_of)

    def location(self, name: str) -> str:
        return str(self._file_of.get(name, self._folder))

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._files[self._file_of[name]].get_slice(name).get_shape())

    def read(self, name: str, part: Part | None = None) -> Tensor:
        tensor: Tensor = self._files[self._file_of[name]].get_tensor(name)  # a view: only what is used is read
        return cut(tensor, part)

    def _check_index(self) -> None:
        index = self._folder / INDEX
        if not index.exists():
            return
        for name, shard in _weight_map(index).items():
            if name not in self._file_of:
                raise BadCheckpoint(f"{self._folder / shard}: tensor {name[:200]} is missing, though {INDEX} lists it")


def _shards(folder: Path) -> list[Path]:
    index = folder / INDEX
    if index.exists():
        paths = sorted(folder / _plain_name(index, name) for name in set(_weight_map(index).values()))
        missing = [path.name for path in paths if not path.exists()]
        if missing:
            raise BadCheckpoint(
                f"{folder}: {len(missing)} of {len(paths)} shards are missing, the first is {missing[0]}"
            )
        return paths
    paths = sorted(folder.glob("*.safetensors"))
    if paths:
        return paths
    pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickled:
        raise Unsupported(
            f"{folder / pickled[0]}: weights in this format can run code when loaded, so they are refused; "
            "get the safetensors version, or convert it with `transformers` on a machine where you trust the file"
        )
    raise ModelNotFound(f"{folder} holds no .safetensors files")


def _weight_map(index: Path) -> dict[str, str]:
    """Which file holds each tensor."""
    found = read_json(index).get("weight_map")
    if not isinstance(found, dict) or not found or not all(isinstance(shard, str) for shard in found.values()):
        raise BadCheckpoint(f"{index}: weight_map must be an object that names a file for each tensor")
    return found


def _plain_name(index: Path, name: str) -> str:
    if Path(name).name != name or not name.endswith(".safetensors"):
        raise BadCheckpoint(
            f"{index}: shard name {name[:80]!r} is not the name of a .safetensors file in the same folder"
        )
    return name


def _open(path: Path) -> safe_open:
    try:
        return safe_open(str(path), framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        raise BadCheckpoint(f"{path} is damaged: {str(error)[:300]}") from None

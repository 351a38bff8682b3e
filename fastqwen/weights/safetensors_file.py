"""safetensors checkpoints, single or sharded with an index. The files are mapped, not read."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastqwen.errors import BadCheckpoint
from fastqwen.model_config import read_json
from fastqwen.sharding import Part
from fastqwen.weights.refusals import SAFETENSORS, check_finished, damaged, no_weights, not_weights, visible
from fastqwen.weights.source import cut

log = logging.getLogger(__name__)

WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# Weights of other things, which folders hold beside a model's.
OTHERS = re.compile(r"(adapter_|consolidated|optimizer|mtp|vision|audio|scheduler|training_|value_head|random_states)")
SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")
STACKED = re.compile(r"(.+\.experts\.)(gate_up_proj|down_proj)(\.weight)?")


class _Place(NamedTuple):
    file: Path
    tensor: str  # as the file calls it
    expert: int | None = None  # its index in a tensor that has a layer's experts
    half: int | None = None  # of gate and up in one tensor


class SafetensorsCheckpoint:
    """Raises BadCheckpoint for a damaged file, Unsupported where only pickled weights are there.

    ``lacking`` are tensors that the index lists and no file has, each with the file that should have it.
    """

    def __init__(self, folder: Path, base_name: str | None = None) -> None:
        """``base_name`` is what a quantization calls its file."""
        self._folder = folder
        self._files: dict[Path, safe_open] = {}
        self._places: dict[str, _Place] = {}
        chosen, listed = choose_files(folder, base_name)
        for path in chosen:
            check_finished(path)
            self._files[path] = _open(path)
            for name in self._files[path].keys():
                self._put(dict(_places(self._files[path], path, name)))
        gone = {shard for shard in set(listed.values()) if not (folder / shard).exists()}
        self.lacking = {name: folder / shard for name, shard in listed.items() if shard in gone or not self._has(name)}
        self.unused_files = sorted({*visible(folder, SAFETENSORS)} - {path.name for path in chosen})

    def _put(self, places: dict[str, _Place]) -> None:
        """Of a tensor that stands in two files the later one counts, as in transformers."""
        for name in places.keys() & self._places.keys():
            earlier = self._read(self._places[name])
            if not torch.equal(earlier, self._read(places[name])):
                log.warning(
                    "tensor %s is another one in %s and %s; the latter counts",
                    name,
                    self._places[name].file,
                    places[name].file,
                )
        self._places.update(places)

    def names(self) -> list[str]:
        return list(self._places)

    def location(self, name: str) -> str:
        if name in self._places:
            return str(self._places[name].file)
        return str(self.lacking.get(name, self._folder))

    def shape(self, name: str) -> tuple[int, ...]:
        place = self._places[name]
        shape = tuple(self._files[place.file].get_slice(place.tensor).get_shape())
        if place.expert is None:
            return shape
        return shape[1:] if place.half is None else (shape[1] // 2, *shape[2:])

    def read(self, name: str, part: Part | None = None) -> Tensor:
        return cut(self._read(self._places[name]), part)

    def _read(self, place: _Place) -> Tensor:
        file = self._files[place.file]
        if place.expert is None:
            tensor: Tensor = file.get_tensor(place.tensor)  # a view: only what is used is read
        else:
            tensor = file.get_slice(place.tensor)[place.expert]
            if place.half is not None:
                tensor = tensor.chunk(2)[place.half]
        return tensor

    def _has(self, name: str) -> bool:
        return name in self._places or STACKED.fullmatch(name) is not None


def _places(file: safe_open, path: Path, name: str) -> Iterator[tuple[str, _Place]]:
    """Our names for what a tensor of the file holds: itself, or the matrices of all experts of a layer.

    Stacked they are [experts, out, in], and gate comes before up, as transformers 5 holds and may save them.
    """
    stacked = STACKED.fullmatch(name)
    shape = file.get_slice(name).get_shape() if stacked else []
    if stacked is None or len(shape) != 3:
        yield name, _Place(path, name)
        return
    prefix, kind, _ = stacked.groups()
    for expert in range(shape[0]):
        if kind == "down_proj":
            yield f"{prefix}{expert}.down_proj.weight", _Place(path, name, expert)
        else:
            yield f"{prefix}{expert}.gate_proj.weight", _Place(path, name, expert, 0)
            yield f"{prefix}{expert}.up_proj.weight", _Place(path, name, expert, 1)


def choose_files(folder: Path, base_name: str | None = None) -> tuple[list[Path], dict[str, str]]:
    """The files with the model's weights, in transformers' order of preference, and what their index lists."""
    if (folder / WHOLE).exists():
        return [folder / WHOLE], {}
    index = folder / INDEX
    if index.exists():
        listed = _weight_map(index)
        paths = sorted(folder / _plain_name(index, name) for name in set(listed.values()))
        return [path for path in paths if path.exists()], listed
    names = visible(folder, SAFETENSORS)
    if base_name is not None and f"{base_name}.safetensors" in names:
        return [folder / f"{base_name}.safetensors"], {}
    own = [name for name in names if not OTHERS.match(name)]
    if not own:
        raise no_weights(folder)
    families = {shard[1] if (shard := SHARD.fullmatch(name)) else name for name in own}
    if len(families) > 1:
        raise BadCheckpoint(
            f"{folder} holds {', '.join(own[:4])}{' and others' if len(own) > 4 else ''}, but neither {WHOLE} nor {INDEX}, "
            f"which would say which of them is the model: rename that one to {WHOLE}"
        )
    shard = SHARD.fullmatch(own[0])
    if shard is not None and len(own) != int(shard[3]):
        raise BadCheckpoint(
            f"{folder}: {int(shard[3]) - len(own)} of {int(shard[3])} shards are missing; fetch them again"
        )
    return [folder / name for name in own], {}


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
        raise not_weights(path) or damaged(path, error) from None
    except MemoryError:
        size = path.stat().st_size
        raise BadCheckpoint(f"{path} has {size} bytes, and this process may not map so many (ulimit -v)") from None

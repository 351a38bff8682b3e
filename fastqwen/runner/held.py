"""Weights that outlive their engine: in host memory while it sleeps, in their places on the device when it wakes up."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from fastqwen.layers.decoder import Decoder
from fastqwen.weights.watch import MappedFiles


class HeldWeights:
    """Of one process that computes alone. The decoder's own objects stay what they are: only the memory behind its tensors
    goes and comes, so views and tensors in common stay so."""

    def __init__(self, decoder: Decoder, num_bytes: int, mapped: MappedFiles) -> None:
        self.decoder, self.num_bytes, self.mapped = decoder, num_bytes, mapped
        self._away: list[tuple[torch.UntypedStorage, Tensor]] = []

    def put_away(self) -> None:
        """To host memory, pinned where there is enough of it. What is there already stays where it is. No step may run."""
        storages = {one.untyped_storage().data_ptr(): one.untyped_storage() for one in tensors_of(self.decoder)}
        for storage in storages.values():
            if not storage.nbytes() or not is_on_a_device(storage):
                continue
            copy = _host_memory(storage.nbytes())
            copy.copy_(_bytes_of(storage))
            storage.resize_(0)
            self._away.append((storage, copy))

    def bring_back(self) -> None:
        away, self._away = self._away, []
        for storage, copy in away:
            storage.resize_(copy.nbytes)
            _bytes_of(storage).copy_(copy)


def give_back() -> None:
    """What nobody holds any more, to the system and the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def tensors_of(thing: Any, seen: set[int] | None = None) -> Iterator[Tensor]:
    """Those that an object of ours holds, in whatever parts. What a function remembers is not looked at: it stays where it is."""
    seen = set() if seen is None else seen
    if id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, Tensor):
        yield thing
        return
    parts: Any = ()
    if isinstance(thing, dict):
        parts = thing.values()
    elif isinstance(thing, (list, tuple)):
        parts = thing
    elif isinstance(thing, partial):
        parts = [*thing.args, *thing.keywords.values()]
    elif isinstance(thing, MethodType):
        parts = [thing.__self__]
    elif type(thing).__module__.partition(".")[0] == "fastqwen":
        parts = vars(thing).values() if hasattr(thing, "__dict__") else ()
    for part in parts:
        yield from tensors_of(part, seen)


def is_on_a_device(storage: torch.UntypedStorage) -> bool:
    return storage.device.type != "cpu"


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _host_memory(num_bytes: int) -> Tensor:
    if torch.cuda.is_available():
        try:
            return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
        except RuntimeError:  # a system may bound what is pinned; the copy is only slower then
            pass
    return torch.empty(num_bytes, dtype=torch.uint8)

"""Where the ranks of one model compute, when one host is not enough: pure.

Each host has equally many of them, in the order of their numbers: the worker's own host the first ones.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec

from fastqwen.errors import BadConfig
from fastqwen.ranks.wire import Begin

WEIGHTS = (".safetensors", ".gguf", ".bin")
ENDS_BYTES = 2**16  # of each large file, what is compared at its start and at its end


class Places(msgspec.Struct, frozen=True):
    """``meeting`` is where the first rank listens for the others, ``hosts`` those of `fastqwen ranks`, as host:port."""

    hosts: list[str]
    meeting: str

    def host_of(self, begin: Begin) -> int:
        """0 is the worker's own."""
        return begin.index // self.ranks_each(begin.count)

    def ranks_each(self, count: int) -> int:
        return count // (1 + len(self.hosts))

    def seat_of(self, begin: Begin) -> tuple[int, int]:
        """Its number on its host, and how many there are there."""
        each = self.ranks_each(begin.count)
        return begin.index % each, each


def check_even(num_ranks: int, num_hosts: int) -> None:
    """Raises BadConfig where not every host has equally many ranks, at least one."""
    if num_ranks % num_hosts:
        raise BadConfig(
            f"--tensor-parallel-size is {num_ranks}, which {num_hosts} hosts cannot share evenly: this one and those of "
            f"--rank-hosts; {num_hosts * max(1, round(num_ranks / num_hosts))} would do"
        )


def checkpoint_digest(path: Path) -> str:
    """Equal where two hosts hold the same checkpoint, as far as can be told without reading all of it: the configuration, and
    the sizes and both ends of the files of weights."""
    digest = hashlib.blake2b(digest_size=16)
    files = [path] if path.is_file() else sorted(one for one in path.iterdir() if one.suffix in WEIGHTS)
    if path.is_dir() and (path / "config.json").is_file():
        files.append(path / "config.json")
    for file in files:
        size = file.stat().st_size
        with file.open("rb") as opened:
            start = opened.read(ENDS_BYTES)
            opened.seek(max(0, size - ENDS_BYTES))
            digest.update(f"{'' if path.is_file() else file.name}:{size}:".encode() + start + opened.read(ENDS_BYTES))
    return digest.hexdigest()

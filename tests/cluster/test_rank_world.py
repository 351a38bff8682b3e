"""Sums and gathered parts over the cluster's own connections: each rank is a thread here, its connections are real."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastqwen.cluster.places import Places, check_even, checkpoint_digest
from fastqwen.cluster.rank_world import StarWorld
from fastqwen.cluster.sockets import free_port
from fastqwen.config import EngineConfig
from fastqwen.errors import BadConfig
from fastqwen.ranks.wire import Begin

TOKEN = "a-token-of-these-tests-only"


def together(count: int, work: Callable[[StarWorld], Any]) -> list[Any]:
    """What each of the ranks gets."""
    port, found, failed = free_port("127.0.0.1"), [None] * count, []

    def run(index: int) -> None:
        try:
            found[index] = work(StarWorld(index, count, "127.0.0.1", port, TOKEN))
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=(index,), daemon=True) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failed and not any(thread.is_alive() for thread in threads)
    return found


def part_of(index: int, turn: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn((3, 5), generator=torch.Generator().manual_seed(10 * turn + index)).to(dtype)


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_rank_gets_the_same_sums_in_the_order_of_the_ranks(count: int, dtype: torch.dtype):
    turns = 20

    def work(world: StarWorld) -> list[torch.Tensor]:
        sums = []
        for turn in range(turns):
            x = part_of(world.index, turn, dtype)
            world.all_reduce(x)
            sums.append(x)
        return sums

    found = together(count, work)
    for turn in range(turns):
        expected = torch.zeros(3, 5)
        for index in range(count):
            expected += part_of(index, turn, dtype).float()
        for sums in found:
            assert torch.equal(sums[turn], expected.to(dtype))


def test_parts_stand_in_order_and_the_first_rank_s_word_goes_to_all():
    def work(world: StarWorld) -> tuple[torch.Tensor, torch.Tensor]:
        said = torch.tensor([world.index + 7])
        world.broadcast(said)
        return world.all_gather(torch.full((2, 1), world.index)), said

    for gathered, said in together(3, work):
        assert gathered.tolist() == [[0, 1, 2]] * 2 and said.tolist() == [7]


def test_hosts_share_evenly():
    places = Places(["b:1", "c:1"], "a:2")
    begins = [Begin(EngineConfig(model="m"), "m", index, 6, "", "text") for index in range(6)]
    assert [places.host_of(one) for one in begins] == [0, 0, 1, 1, 2, 2]
    assert [places.seat_of(one) for one in begins] == [(0, 2), (1, 2)] * 3
    with pytest.raises(BadConfig, match=r"--tensor-parallel-size is 4, which 3 hosts cannot share evenly.*3 would do"):
        check_even(4, 3)


def test_another_checkpoint_has_another_digest(tmp_path: Path):
    digests = set()
    for number, (config, weights) in enumerate(
        [("{}", b"a" * 200_000), ("{} ", b"a" * 200_000), ("{}", b"a" * 199_999 + b"b")]
    ):
        for name in ("one", "two"):  # wherever it lies
            folder = tmp_path / f"{name}{number}"
            folder.mkdir()
            (folder / "config.json").write_text(config)
            (folder / "model.safetensors").write_bytes(weights)
            digests.add(checkpoint_digest(folder))
    assert len(digests) == 3

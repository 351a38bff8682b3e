"""The fuzzer's targets on their seeds, on damaged seeds and on noise, so that none of them is ever dead code."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz.seeds import seeds
from tests.fuzz.targets import TARGETS

MAX_SECONDS = 1.0


def timed(target: Callable[[bytes], None], data: bytes) -> None:
    start_s = time.process_time()
    target(data)
    assert time.process_time() - start_s < MAX_SECONDS


def test_each_target_has_seeds():
    assert seeds().keys() == TARGETS.keys()
    assert all(seeds().values())


@pytest.mark.parametrize("name", TARGETS)
def test_seeds_and_their_damage(name: str):
    rng = random.Random(name)
    for seed in seeds()[name]:
        TARGETS[name](seed)  # the first one may load libraries
        for _ in range(60):
            data = bytearray(seed)
            for _ in range(rng.randint(1, 4)):
                at = rng.randrange(len(data) + 1)
                data[at : at + rng.randint(0, 3)] = rng.choice([b"", rng.randbytes(2), bytes(data[at : at + 20])])
            timed(TARGETS[name], bytes(data))


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=60, deadline=None)
@given(data=st.binary(max_size=200) | st.text(max_size=100).map(str.encode))
def test_noise(name: str, data: bytes):
    timed(TARGETS[name], data)

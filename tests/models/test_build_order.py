"""Layers made side by side while a model loads."""

from __future__ import annotations

import gc
import threading
import time

import pytest

from fastqwen.build import _in_order
from fastqwen.collections_paused import collections_paused


def test_layers_are_made_side_by_side_and_come_in_order() -> None:
    both = threading.Barrier(2, timeout=30)

    def make(index: int) -> int:
        if index in (1, 2):
            both.wait()  # passes only if the other is being made as well
        return index

    assert list(_in_order(make, 7, 2)) == list(range(7))  # type: ignore[arg-type]


def test_after_an_error_no_other_layer_is_read() -> None:
    made = []

    def make(index: int) -> int:
        made.append(index)
        if index == 3:
            raise ValueError("layer 3")
        time.sleep(0.01 * (index > 3))  # as long as a layer, or nearly
        return index

    found = _in_order(make, 1000, 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="layer 3"):
        list(found)
    assert len(made) < 1000


def test_collections_are_paused_and_come_back() -> None:
    with collections_paused():
        assert not gc.isenabled()
        with collections_paused():
            pass
        assert not gc.isenabled()  # the outer one still counts
    assert gc.isenabled()

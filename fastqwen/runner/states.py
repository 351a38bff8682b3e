"""States of fixed size, slot by slot: whose tokens each holds, and the copies that are kept for the prefix cache.

A copy lies in a slot of its own behind those of running sequences. How many tokens every slot's states hold is known here,
so that a state that belongs behind other tokens than a row's is refused, and not computed with.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastqwen.kernels import LayerState
from fastqwen.records import Admission, Row


class WrongState(AssertionError):
    """A bug of ours: a row would go on from a state that holds other tokens than those in front of it."""


class States:
    def __init__(self, layers: Sequence[LayerState], first_kept: int) -> None:
        """``first_kept`` is the first slot for copies."""
        self.layers = list(layers)
        self.has_fixed = any(layer.of_slot(0) for layer in layers)
        self._first_kept = first_kept
        self._held: dict[int, int] = {}  # tokens, by slot

    def before(self, admissions: Sequence[Admission], rows: Sequence[Row]) -> None:
        """A step's newcomers begin with nothing, or with a copy. Raises WrongState."""
        if not self.has_fixed:
            return
        copies = []
        for one in admissions:
            self._held[one.slot] = 0
            if one.kept_state is not None:
                kept = self._first_kept + one.kept_state
                self._held[one.slot] = self._held.get(kept, 0)
                copies.append((kept, one.slot))
        for row in rows:
            held = self._held.get(row.slot, 0)
            if held != row.start + row.repeats:
                raise WrongState(
                    f"the row of slot {row.slot} begins at token {row.start}, the slot's states hold {held} tokens"
                )
        self._copy(copies)

    def after(self, rows: Sequence[Row]) -> None:
        """The rows were computed: keep the copies that they ask for."""
        if not self.has_fixed:
            return
        copies = []
        for row in rows:
            self._held[row.slot] = row.end
            if row.keep_state is not None:
                kept = self._first_kept + row.keep_state
                self._held[kept] = row.end
                copies.append((row.slot, kept))
        self._copy(copies)

    def _copy(self, copies: Sequence[tuple[int, int]]) -> None:
        """From slot to slot, all layers with a few launches; no slot is both read and written."""
        if copies:
            sources = [part for source, _ in copies for layer in self.layers for part in layer.of_slot(source)]
            targets = [part for _, target in copies for layer in self.layers for part in layer.of_slot(target)]
            torch._foreach_copy_(targets, sources)

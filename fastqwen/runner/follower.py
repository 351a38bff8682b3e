"""Runners of the shards behind the first: they compute their part of each step, and are told what the first one chose.

A step takes the same way as on the first shard, so that both make the same calls to each other in the same order. Only
choosing is left out: it may depend on what the first one alone knows, such as whether a grammar's mask was there in time.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fastqwen.records import Admission, Failure
from fastqwen.runner.choices import Choice
from fastqwen.runner.mask_lanes import Bits
from fastqwen.runner.model_runner import ModelRunner


class GrammarMarks:
    """Which slots have a grammar: their rows are chosen apart from the others."""

    def __init__(self) -> None:
        self._slots: set[int] = set()

    def admit(self, admissions: Sequence[Admission]) -> None:
        for one in admissions:
            (self._slots.discard if one.grammar is None else self._slots.add)(one.slot)

    def constrains(self, slot: int) -> bool:
        return slot in self._slots

    def is_late(self, slot: int) -> bool:
        return False  # the first shard chooses

    def bits(self, choices: Sequence[Choice], vocab_size: int, errors: dict[int, Failure]) -> tuple[set[int], Bits]:
        return set(), np.full((len(choices), 0), -1, dtype=np.int32)

    def take(self, slots: Sequence[int], token_ids: Sequence[int]) -> None: ...


class Follower(ModelRunner):
    def _sample(self, logits: Tensor, choices: list[Choice], errors: dict[int, Failure]) -> tuple[list[int], set[int]]:
        told = torch.zeros(len(choices), dtype=torch.int32)
        self._decoder.embed.world.broadcast(told)
        self.slots.token_ids[[one.slot for one in choices], [one.position for one in choices]] = told
        return told.tolist(), set()

"""What the device keeps of each running sequence, in a place that does not move while it runs.

Tokens live here, too: the sampler writes a new token into its sequence's row, and the next step reads it from there, so
that a step can start before the host has seen what the previous one sampled.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fastqwen.layers.rotary import inverse_frequencies
from fastqwen.model_config import ModelConfig
from fastqwen.records import Admission, Row, SamplingParams

MAX_CACHED_PROFILES = 64


class Slots:
    """Besides the sequences' slots there is one more, ``spare``, for rows that only pad a batch."""

    def __init__(
        self, model: ModelConfig, *, num_slots: int, max_model_len: int, block_size: int, device: torch.device
    ) -> None:
        def make(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros((num_slots + 1, *shape), dtype=dtype, device=device)

        self.device = device
        self.spare = num_slots
        self._rope = model.rope
        self._head_dim = model.head_dim
        self._vocab_size = model.vocab_size
        self._frequencies: dict[str, tuple[Tensor, float]] = {}
        self.token_ids = make(max_model_len + 2)
        self.block_tables = make(-(-max_model_len // block_size) + 1)
        self.inverse_frequencies = make(model.head_dim // 2, dtype=torch.float32)
        self.rope_scale = make(dtype=torch.float32)
        self.temperature = make(dtype=torch.float32)
        self.top_k = make()
        self.top_p = make(dtype=torch.float32)
        self.min_p = make(dtype=torch.float32)
        self.seed = make(dtype=torch.int64)
        # What the host looks up to decide which parts of the sampler a step needs.
        self.sampling: list[SamplingParams] = [SamplingParams()] * num_slots
        self.num_prompt = [0] * num_slots
        self.stop_token_ids: list[list[int]] = [[]] * num_slots
        self._num_blocks = [0] * num_slots

    def admit(self, admissions: Sequence[Admission]) -> None:
        """All of a step's newcomers in a handful of copies, however many they are."""
        if not admissions:
            return
        slots = self.upload(np.array([one.slot for one in admissions], dtype=np.int64))
        ids = np.concatenate([np.asarray(one.token_ids, dtype=np.int32) for one in admissions])
        width = self.token_ids.shape[1]
        places = np.concatenate([one.slot * width + np.arange(len(one.token_ids)) for one in admissions])
        self.token_ids.view(-1)[self.upload(places)] = self.upload(ids)
        profiles = [self._profile(one.rope_key) for one in admissions]
        self.inverse_frequencies[slots] = torch.stack([frequencies for frequencies, _ in profiles])
        wishes = [one.sampling for one in admissions]
        floats = [
            [0.0 if wish.greedy else wish.temperature, wish.top_p, wish.min_p, scale]
            for wish, (_, scale) in zip(wishes, profiles, strict=True)
        ]
        packed = self.upload(np.array(floats, dtype=np.float32))
        columns = (self.temperature, self.top_p, self.min_p, self.rope_scale)
        for column, target in enumerate(columns):
            target[slots] = packed[:, column]
        self.top_k[slots] = self.upload(np.array([min(max(0, w.top_k), self._vocab_size) for w in wishes], np.int32))
        self.seed[slots] = self.upload(np.array([one.seed for one in admissions], dtype=np.int64))
        for one in admissions:
            self.sampling[one.slot] = one.sampling
            self.num_prompt[one.slot] = one.num_prompt_tokens
            self.stop_token_ids[one.slot] = one.stop_token_ids
            self._num_blocks[one.slot] = 0

    def extend(self, rows: Sequence[Row]) -> None:
        """Append the rows' new blocks to their slots' block tables."""
        places: list[int] = []
        blocks: list[int] = []
        width = self.block_tables.shape[1]
        for row in rows:
            if row.new_blocks:
                start = row.slot * width + self._num_blocks[row.slot]
                places.extend(range(start, start + len(row.new_blocks)))
                blocks.extend(row.new_blocks)
                self._num_blocks[row.slot] += len(row.new_blocks)
        if places:
            values = self.upload(np.array(blocks, dtype=np.int32))
            self.block_tables.view(-1)[self.upload(np.array(places, dtype=np.int64))] = values

    def upload(self, values: np.ndarray) -> Tensor:
        """To the device, without waiting for it: a pinned copy stays alive until the device has read it."""
        host = torch.from_numpy(values)
        if self.device.type != "cuda":
            return host.to(self.device)
        return host.pin_memory().to(self.device, non_blocking=True)

    def _profile(self, key: str) -> tuple[Tensor, float]:
        if key not in self._frequencies:
            if len(self._frequencies) >= MAX_CACHED_PROFILES:
                self._frequencies.clear()
            frequencies, scale = inverse_frequencies(self._rope, self._head_dim, key)
            self._frequencies[key] = frequencies.to(self.device), scale
        return self._frequencies[key]

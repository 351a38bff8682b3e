"""What the device keeps of each running sequence, in a place that does not move while it runs.

Tokens live here, too: the sampler writes a new token into its sequence's row, and the next step reads it from there, so
that a step can start before the host has seen what the previous one sampled.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastqwen.layers.rotary import inverse_frequencies
from fastqwen.model_config import ModelConfig
from fastqwen.records import Admission, Row, SamplingParams


class Slots:
    def __init__(
        self, model: ModelConfig, *, num_slots: int, max_model_len: int, block_size: int, device: torch.device
    ) -> None:
        def make(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self._rope = model.rope
        self._head_dim = model.head_dim
        self._frequencies: dict[str, tuple[Tensor, float]] = {}
        self.token_ids = make(num_slots, max_model_len + 1)
        self.block_tables = make(num_slots, -(-max_model_len // block_size))
        self.inverse_frequencies = make(num_slots, model.head_dim // 2, dtype=torch.float32)
        self.rope_scale = make(num_slots, dtype=torch.float32)
        self.temperature = make(num_slots, dtype=torch.float32)
        self.top_k = make(num_slots)
        self.top_p = make(num_slots, dtype=torch.float32)
        self.min_p = make(num_slots, dtype=torch.float32)
        self.seed = make(num_slots, dtype=torch.int64)
        # What the host looks up to decide which parts of the sampler a step needs.
        self.sampling: list[SamplingParams] = [SamplingParams()] * num_slots
        self.num_prompt = [0] * num_slots
        self.stop_token_ids: list[list[int]] = [[]] * num_slots
        self._num_blocks = [0] * num_slots

    def admit(self, admission: Admission) -> None:
        slot, sampling = admission.slot, admission.sampling
        ids = torch.tensor(admission.token_ids, dtype=torch.int32)
        self.token_ids[slot, : len(ids)].copy_(ids, non_blocking=True)
        frequencies, scale = self._profile(admission.rope_key)
        self.inverse_frequencies[slot].copy_(frequencies)
        self.rope_scale[slot] = scale
        self.temperature[slot] = 0.0 if sampling.greedy else sampling.temperature
        self.top_k[slot] = max(0, sampling.top_k)
        self.top_p[slot] = sampling.top_p
        self.min_p[slot] = sampling.min_p
        self.seed[slot] = admission.seed
        self.sampling[slot] = sampling
        self.num_prompt[slot] = admission.num_prompt_tokens
        self.stop_token_ids[slot] = admission.stop_token_ids
        self._num_blocks[slot] = 0

    def extend(self, row: Row) -> None:
        """Append a row's new blocks to its slot's block table."""
        if row.new_blocks:
            start = self._num_blocks[row.slot]
            stop = start + len(row.new_blocks)
            blocks = torch.tensor(row.new_blocks, dtype=torch.int32)
            self.block_tables[row.slot, start:stop].copy_(blocks, non_blocking=True)
            self._num_blocks[row.slot] = stop

    def _profile(self, key: str) -> tuple[Tensor, float]:
        if key not in self._frequencies:
            if len(self._frequencies) >= MAX_CACHED_PROFILES:
                self._frequencies.clear()
            frequencies, scale = inverse_frequencies(self._rope, self._head_dim, key)
            self._frequencies[key] = frequencies.to(self.inverse_frequencies.device), scale
        return self._frequencies[key]


MAX_CACHED_PROFILES = 64

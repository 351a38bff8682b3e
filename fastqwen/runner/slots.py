"""What the device keeps of each running sequence, in a place that does not move while it runs.

Tokens live here, too: the sampler writes a new token into its sequence's row, and the next step reads it from there, so
that a step can start before the host has seen what the previous one sampled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastqwen.kernels.limits import MAX_BENT, WISH_WORDS
from fastqwen.kernels.wishes import COLUMN
from fastqwen.layers.rotary import inverse_frequencies
from fastqwen.model_config import ModelConfig
from fastqwen.records import Admission, Row, Sampling
from fastqwen.runner.wishes import Words, bent_of, device_tells, host_forbids, line_of, neutral_line

MAX_CACHED_PROFILES = 64
ALIGNED_WORDS = 4  # kernels are compiled for fields that begin at multiples of 16 bytes


class Slots:
    """Besides the sequences' slots there is one more, ``spare``, for rows that only pad a batch.

    All fields are views of one array of 32-bit words, so that all that a step changes of them takes one copy to the device
    and one scatter there: launches, not bytes, are what an admission costs the host of a GPU.
    """

    def __init__(
        self, model: ModelConfig, *, num_slots: int, max_model_len: int, block_size: int, device: torch.device
    ) -> None:
        self.device = device
        self.spare = num_slots
        self._rope = model.rope
        self._rotary_dim = model.rotary_dim
        self._vocab_size = model.vocab_size
        self._profiles: dict[str, tuple[Words, float]] = {}
        self._widths = {  # words of a slot
            "token_ids": max_model_len + 2,
            "block_tables": -(-max_model_len // block_size) + 1,
            "inverse_frequencies": model.rotary_dim // 2,
            "rope_scale": 1,
            "wishes": WISH_WORDS,
            "bent": 2 * MAX_BENT,
        }
        self._begins: dict[str, int] = {}
        num_words = 0
        for name, width in self._widths.items():
            self._begins[name] = num_words
            num_words += -(-(num_slots + 1) * width // ALIGNED_WORDS) * ALIGNED_WORDS
        self._words = torch.zeros(num_words, dtype=torch.int32, device=device)
        self.token_ids = self._field("token_ids")
        self.block_tables = self._field("block_tables")
        self.inverse_frequencies = self._field("inverse_frequencies").view(torch.float32)
        self.rope_scale = self._field("rope_scale").view(torch.float32)[:, 0]
        self.wishes = self._field("wishes")  # as kernels/wishes.py has them
        self.wishes.copy_(torch.from_numpy(neutral_line()))
        self.bent = self._field("bent").view(num_slots + 1, MAX_BENT, 2)
        self.seed = self.wishes.view(torch.int64)[:, COLUMN["seed"] // 2]
        self.temperature = self._wish("temperature").view(torch.float32)
        self.top_k = self._wish("top_k")
        self.top_p = self._wish("top_p").view(torch.float32)
        self.min_p = self._wish("min_p").view(torch.float32)
        # What the host looks up to decide which parts of the sampler a step needs.
        self.sampling: list[Sampling] = [Sampling()] * num_slots
        self.is_plain = [True] * (num_slots + 1)  # the device's sampler does all that is wished, and tells nothing
        self.host_forbids = [False] * num_slots
        self.device_tells = [False] * num_slots
        self.num_prompt = [0] * num_slots
        self.stop_token_ids: list[list[int]] = [[]] * num_slots
        self._num_blocks = [0] * num_slots

    def update(
        self, admissions: Sequence[Admission], rows: Sequence[Row], counts: Mapping[int, Tensor] | None = None
    ) -> None:
        """Take a step's newcomers in, then append the rows' new blocks to their slots' block tables. ``counts`` int16 [vocab]
        are of slots whose penalties the device's sampler computes."""
        places: list[NDArray[np.int64]] = []
        words: list[Words] = []

        def put(name: str, slot: int, values: Words) -> None:
            start = self._begins[name] + slot * self._widths[name]
            places.append(np.arange(start, start + len(values)))
            words.append(values)

        addresses = {slot: one.data_ptr() for slot, one in (counts or {}).items()}
        for one in admissions:
            frequencies, rope_scale = self._profile(one.rope_key)
            put("token_ids", one.slot, np.array(one.token_ids, dtype=np.int32))
            put("inverse_frequencies", one.slot, frequencies)
            put("rope_scale", one.slot, np.array([rope_scale], dtype=np.float32).view(np.int32))
            put("wishes", one.slot, line_of(one, self._vocab_size, addresses.get(one.slot, 0)))
            put("bent", one.slot, bent_of(one))
            self.sampling[one.slot] = one.sampling
            self.host_forbids[one.slot] = host_forbids(one.sampling)
            self.device_tells[one.slot] = device_tells(one.sampling)
            tells = one.sampling.logprobs is not None or one.sampling.prompt_logprobs is not None
            self.is_plain[one.slot] = not tells and not self.host_forbids[one.slot] and one.grammar is None
            self.num_prompt[one.slot] = one.num_prompt_tokens
            self.stop_token_ids[one.slot] = one.stop_token_ids
            self._num_blocks[one.slot] = 0
        table_places, blocks = self._new_blocks(rows)
        if blocks:
            places.append(np.array(table_places, dtype=np.int64))
            words.append(np.array(blocks, dtype=np.int32))
        if places:
            self._write(np.concatenate(places), np.concatenate(words))

    def upload(self, values: np.ndarray) -> Tensor:
        """To the device, without waiting for it: a pinned copy stays alive until the device has read it."""
        host = torch.from_numpy(values)
        if self.device.type != "cuda":
            return host.to(self.device)
        return host.pin_memory().to(self.device, non_blocking=True)

    def _field(self, name: str) -> Tensor:
        """int32 [slots, words of a slot]"""
        width, num_slots = self._widths[name], self.spare + 1
        return self._words[self._begins[name] :][: num_slots * width].view(num_slots, width)

    def _wish(self, name: str) -> Tensor:
        """int32 [slots]"""
        return self.wishes[:, COLUMN[name]]

    def _new_blocks(self, rows: Sequence[Row]) -> tuple[list[int], list[int]]:
        """Each row's new blocks, and the words that they belong into."""
        begin, width = self._begins["block_tables"], self._widths["block_tables"]
        places: list[int] = []
        blocks: list[int] = []
        for row in rows:
            if row.new_blocks:
                start = begin + row.slot * width + self._num_blocks[row.slot]
                places.extend(range(start, start + len(row.new_blocks)))
                blocks.extend(row.new_blocks)
                self._num_blocks[row.slot] += len(row.new_blocks)
        return places, blocks

    def _write(self, places: NDArray[np.int64], words: Words) -> None:
        """No place twice: a scatter has no order."""
        packed = self.upload(np.concatenate([places.view(np.int32), words]))
        self._words.scatter_(0, packed[: 2 * len(places)].view(torch.int64), packed[2 * len(places) :])

    def _profile(self, key: str) -> tuple[Words, float]:
        """The profile's frequencies, and its factor on cosine and sine."""
        if key not in self._profiles:
            if len(self._profiles) >= MAX_CACHED_PROFILES:
                self._profiles.clear()
            frequencies, scale = inverse_frequencies(self._rope, self._rotary_dim, key)
            self._profiles[key] = frequencies.numpy().view(np.int32), scale
        return self._profiles[key]

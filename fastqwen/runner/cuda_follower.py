"""The same as follower.py for an NVIDIA GPU: what the first shard chose goes from device to device, and is recorded with the
step."""

from __future__ import annotations

import torch
from torch import Tensor

from fastqwen.runner.cuda_runner import CudaRunner
from fastqwen.runner.pending import Extras


class CudaFollower(CudaRunner):
    def _next_tokens(self, logits: Tensor, row_slots: Tensor, positions: Tensor) -> Tensor:
        tokens = torch.zeros(logits.shape[0], dtype=torch.int32, device=logits.device)
        self._decoder.embed.world.broadcast(tokens)
        # A row that failed has no token; what follows it is not read.
        self.slots.token_ids[row_slots.long(), positions.long()] = tokens.clamp(min=0)
        return tokens

    def _bent(self, logits: Tensor, extras: Extras) -> Tensor:
        return logits

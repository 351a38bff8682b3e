"""The same as follower.py for an NVIDIA GPU: what the first shard chose goes from device to device, and is recorded with the
step."""

from __future__ import annotations

import torch
from torch import Tensor

from fastqwen.kernels.triton.sampling import TOLD_WORDS
from fastqwen.runner.cuda_runner import CudaRunner
from fastqwen.runner.pending import Extras


class CudaFollower(CudaRunner):
    def _next_tokens(
        self,
        logits: Tensor,
        row_slots: Tensor,
        positions: Tensor,
        raw: Tensor | None = None,
        allowed: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        tokens = torch.zeros(logits.shape[0], dtype=torch.int32, device=logits.device)
        self._decoder.embed.world.broadcast(tokens)
        # A row that failed has no token; what follows it is not read.
        self.slots.token_ids[row_slots.long(), positions.long()] = tokens.clamp(min=0)
        return tokens, tokens.new_zeros((len(tokens), TOLD_WORDS))

    def _forbid(self, logits: Tensor, extras: Extras) -> Tensor | None:
        return None

"""Part of vLLM's module layout: what scripts ask of the machine that they run on."""

from __future__ import annotations

import torch

__all__ = ["current_platform"]


class _Platform:
    def is_cuda(self) -> bool:
        return torch.cuda.is_available()

    def is_cuda_alike(self) -> bool:
        return self.is_cuda()

    def is_cpu(self) -> bool:
        return not self.is_cuda()

    def is_rocm(self) -> bool:
        return False

    def is_xpu(self) -> bool:
        return False

    def is_tpu(self) -> bool:
        return False

    @property
    def device_type(self) -> str:
        return "cuda" if self.is_cuda() else "cpu"


current_platform = _Platform()

"""Part of vLLM's module layout: what its scripts end with."""

from __future__ import annotations

import gc

import torch

__all__ = ["cleanup_dist_env_and_memory"]


def cleanup_dist_env_and_memory(shutdown_ray: bool = False) -> None:
    """What an LLM that nobody holds any more had of a GPU goes back to the driver. There is nothing else to end."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

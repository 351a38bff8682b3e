"""Part of vLLM's module layout: what its scripts import from here."""

from __future__ import annotations

import uuid

from fastqwen.vllm.arguments import FlexibleArgumentParser

__all__ = ["FlexibleArgumentParser", "random_uuid"]


def random_uuid() -> str:
    return uuid.uuid4().hex

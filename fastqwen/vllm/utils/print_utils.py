"""Part of vLLM's module layout: what its scripts for vectors print with."""

from __future__ import annotations

SHOWN = 4


def print_embeddings(embeds: list[float], prefix: str = "Embeddings") -> None:
    """A vector's first numbers, and how many there are."""
    more = ", ..." if len(embeds) > SHOWN else ""
    print(f"{prefix}: [{', '.join(map(str, embeds[:SHOWN]))}{more}] (size={len(embeds)})")

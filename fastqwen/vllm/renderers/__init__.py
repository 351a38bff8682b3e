"""Part of vLLM's module layout."""

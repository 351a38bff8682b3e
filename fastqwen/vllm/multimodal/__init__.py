"""Part of vLLM's module layout: scripts for texts as well as for images import from here; without images they run."""

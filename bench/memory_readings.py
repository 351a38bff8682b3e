"""What memory a starting and stepping engine takes, read at named moments, beside the planner's terms (plan_check.py)."""

from __future__ import annotations

import functools
from typing import Any, Protocol

# Term of fastqwen.plan.memory.Need: what to change where it is off.
BELONGS_TO = {
    "weights": "fastqwen/plan/weights.py: matrices, matrix_bytes",
    "kv_cache": "fastqwen/plan/memory.py: kv_bytes_per_token, predict",
    "state": "fastqwen/plan/memory.py: predict (the tables of runner/slots.py and the padding block)",
    "activations": "fastqwen/plan/buffers.py: _attention, _mlp, _experts (what lives together in a layer)",
    "sampler": "fastqwen/plan/buffers.py: _logits, _wishes",
    "workspace": "fastqwen/plan/facts.py: CUBLAS_BYTES, SPLIT_PARTS, DECODE_PARTS, UNPACK_COPIES; memory.py: _scratch",
    "graphs": "fastqwen/plan/facts.py: GRAPH_NODE_BYTES, KERNELS_PER_LAYER (outside torch); buffers.py: graph_buffers (in torch)",
    "runtime": "fastqwen/plan/facts.py: CONTEXT_BYTES_PER_MULTIPROCESSOR (see measured 'context'), LIBRARY_BYTES (the rest)",
    "rounding": "fastqwen/plan/buffers.py: largest_steps (order of steps); weights.py: rounding_of_weights; "
    "facts.py: FASTQWEN_GPU.rounding_bytes (for each tensor of the cache)",
}


class Meter(Protocol):
    """Memory in bytes, as torch and the driver count it; a test puts its own figures here."""

    def read(self) -> dict[str, int]: ...

    def reset_peaks(self) -> None: ...


class CudaMeter:
    def read(self) -> dict[str, int]:
        import torch

        torch.cuda.synchronize()
        free, total = torch.cuda.mem_get_info()
        return {
            "used": total - free,
            "allocated": torch.cuda.memory_allocated(),
            "reserved": torch.cuda.memory_reserved(),
            "most_allocated": torch.cuda.max_memory_allocated(),
            "most_reserved": torch.cuda.max_memory_reserved(),
        }

    def reset_peaks(self) -> None:
        import torch

        torch.cuda.reset_peak_memory_stats()


class Log:
    """Readings by name, in order. Peaks are those since the reading before."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self.readings: dict[str, dict[str, int]] = {}

    def note(self, name: str) -> None:
        self.readings[name] = self._meter.read()
        self._meter.reset_peaks()

    def after(self, place: Any, name: str, as_what: str) -> None:
        """Read once the function has returned that ``place`` has under this name."""
        inner = getattr(place, name, None)
        if inner is None:
            print(f"{place} has no {name}: no reading {as_what!r}", flush=True)
            return

        @functools.wraps(inner)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            found = inner(*args, **kwargs)
            self.note(as_what)
            return found

        setattr(place, name, wrapped)


def measured(readings: dict[str, dict[str, int]], before: int) -> dict[str, int]:
    """The parts that readings can tell apart, and the peaks."""
    names = list(readings)
    context, cache = readings["context"], readings["cache"]
    empty = readings.get("kernels' scratch", context)  # before the weights
    weights = readings["weights"]["allocated"] - empty["allocated"]
    trial = readings.get("largest step on trial", readings["weights"])
    cache_and_state = cache["allocated"] - trial["allocated"]
    resting = readings.get("graphs", cache)
    last = readings[names[-1]]
    steps = [readings[name] for name in names[names.index("graphs" if "graphs" in readings else "cache") + 1 :]]
    graphs, in_torch = resting["used"] - cache["used"], resting["reserved"] - cache["reserved"]
    beside = last["used"] - before - last["reserved"]
    return {
        "context": context["used"] - before,
        "weights": weights,
        "cache and state": cache_and_state,
        "graphs": graphs,
        "graphs, in torch": in_torch,
        "runtime": beside - (graphs - in_torch),
        "scratch, steps, kept": last["reserved"] - weights - cache_and_state - in_torch,
        "steps, live at once": max(step["most_allocated"] for step in steps) - resting["allocated"],
        "scratch made at start": empty["allocated"]
        - context["allocated"]
        + trial["allocated"]
        - readings["weights"]["allocated"],
        "reserved but free at the end": last["reserved"] - last["allocated"],
        "peak allocated": max(reading["most_allocated"] for reading in readings.values()),
        "peak reserved": max(reading["most_reserved"] for reading in readings.values()),
        "total": max(reading["used"] for reading in readings.values()) - before,
    }


# Measured part: the predicted terms that make it up. All but "steps, live at once", which is a part of the one before,
# add up to the total.
PARTS = {
    "weights": ("weights",),
    "cache and state": ("kv_cache", "state"),
    "graphs": ("graphs",),
    "runtime": ("runtime",),
    "scratch, steps, kept": ("workspace", "activations", "sampler", "rounding"),
    "steps, live at once": ("activations", "sampler"),
    "total": ("total",),
}


def compared(plan: dict[str, int], found: dict[str, int]) -> list[dict[str, Any]]:
    rows = []
    for part, terms in PARTS.items():
        expected = sum(plan.get(term, 0) for term in terms)
        rows.append(
            {
                "part": part,
                "terms": list(terms),
                "predicted_bytes": expected,
                "measured_bytes": found[part],
                "difference": (expected - found[part]) / found["total"],  # as a share of the whole
                "belongs_to": [BELONGS_TO[term] for term in terms if term in BELONGS_TO],
            }
        )
    return rows

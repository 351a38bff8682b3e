"""The planner: from a model's sizes, the user's wishes and a device's facts to what the engine will be given.

The same code answers on paper and at start. Nothing here imports torch.

    facts.py    what a device is; how an engine spends memory
    weights.py  bytes of a GPU's share of the weights
    memory.py   everything that a GPU must hold, term by term
    buffers.py  what a step makes and drops             allocator.py  what torch keeps of it
    states.py   room for states of fixed size
    speed.py    tokens per second from bytes and bandwidth
    steps.py    how many tokens a step may have    generations.py  how fastqwen computes on which GPUs
    gpus.py     the GPU that the user means        catalog.py  the model that the user means
    host.py     this machine's own memory
    device.py   what a device lets an engine have  engine.py   the plan that the engine starts with
    question.py what is asked, what it needs and the line that asks it
    advice.py   fits or not, how far, how fast          changes.py  the cheapest change that makes it fit
    served.py   what the engine takes today
    compare.py  plan against measurement           render.py   the answer as a table, JSON or a plot
"""

from __future__ import annotations

from fastqwen.plan.compare import Line, Measured, compare
from fastqwen.plan.device import choose_dtype
from fastqwen.plan.engine import EnginePlan, make_plan
from fastqwen.plan.facts import DeviceFacts
from fastqwen.plan.memory import kv_bytes_per_token
from fastqwen.plan.weights import weights_bytes

__all__ = [
    "DeviceFacts",
    "EnginePlan",
    "Line",
    "Measured",
    "choose_dtype",
    "compare",
    "kv_bytes_per_token",
    "make_plan",
    "weights_bytes",
]

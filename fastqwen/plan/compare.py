"""Plan against measurement, once the engine has started."""

from __future__ import annotations

import msgspec

from fastqwen.plan.engine import EnginePlan
from fastqwen.plan.facts import GIB

WARN_SHARE = 0.05


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """What the engine found; None where it did not measure."""

    weights_bytes: int | None = None
    peak_bytes: int | None = None
    num_blocks: int | None = None


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """One figure, planned and measured."""

    what: str
    planned: int
    measured: int
    warn: bool
    text: str


def compare(plan: EnginePlan, measured: Measured) -> list[Line]:
    """A line for each figure that was measured; ``warn`` where the two differ by more than 5%."""
    return [
        _line(what, planned, found, in_bytes)
        for what, planned, found, in_bytes in (
            ("weights", plan.weights_bytes, measured.weights_bytes, True),
            ("peak", plan.peak_bytes, measured.peak_bytes, True),
            ("KV blocks", plan.num_blocks, measured.num_blocks, False),
        )
        if found is not None and planned
    ]


def _line(what: str, planned: int, measured: int, in_bytes: bool) -> Line:
    difference = (measured - planned) / planned
    warn = abs(difference) > WARN_SHARE
    figures = (
        f"planned {planned / GIB:.2f} GiB, measured {measured / GIB:.2f} GiB"
        if in_bytes
        else f"planned {planned}, measured {measured}"
    )
    text = f"{what}: {figures} ({difference:+.1%})"
    if warn:
        text += f": more than {WARN_SHARE:.0%} apart"
    return Line(what=what, planned=planned, measured=measured, warn=warn, text=text)

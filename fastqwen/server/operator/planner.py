"""What else this machine could run, for the page: ``python -m fastqwen.server.operator.planner HELD_BYTES`` prints it as JSON.

A process of its own: planning two hundred models takes a second or two, in which no stream may pause.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import msgspec

from fastqwen.errors import FastqwenError
from fastqwen.plan.advice import Answer, best_model, gib, list_models
from fastqwen.plan.gpus import Target, find_target

MODULE = "fastqwen.server.operator.planner"
TIMEOUT_S = 60.0


class Planner:
    """Asked by any number of visitors, it plans once."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self._found: dict[str, Any] | None = None

    async def found(self, held_bytes: int) -> dict[str, Any]:
        """``held_bytes`` of the device are the engine's own: another model would have them. Raises FastqwenError."""
        async with self._lock:
            if self._found is None:
                self._found = await _planned(held_bytes)
            return self._found


async def _planned(held_bytes: int) -> dict[str, Any]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", MODULE, str(held_bytes),
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        printed, said = await asyncio.wait_for(process.communicate(), TIMEOUT_S)
    except TimeoutError:
        process.kill()
        await process.wait()
        raise FastqwenError(f"the planner did not end within {TIMEOUT_S:.0f} s: ask it with fastqwen plan") from None
    if process.returncode:
        last = said.decode(errors="replace").strip().splitlines()[-1:]
        raise FastqwenError(f"the planner failed: {last[0] if last else process.returncode}")
    return json.loads(printed)  # type: ignore[no-any-return]


def plan_this_machine(held_bytes: int) -> dict[str, Any]:
    """Models that fit and are served: what `fastqwen plan --best` recommends, then the others as `fastqwen plan` lists them."""
    target = _without_us(find_target("auto"), held_bytes)
    best = best_model(target)
    running = [one for one in list_models(target) if one.fits and one.command and not one.not_served_yet]
    others = [one for one in running if best is None or one.model != best.model]
    return {"device": target.label, "models": [_row(one) for one in ([] if best is None else [best]) + others]}


def _without_us(target: Target, held_bytes: int) -> Target:
    facts = target.facts
    free_bytes = min(facts.total_bytes, facts.free_bytes + held_bytes)
    return msgspec.structs.replace(target, facts=msgspec.structs.replace(facts, free_bytes=free_bytes))


def _row(one: Answer) -> dict[str, Any]:
    speed = one.speed_single
    return {
        "model": one.model,
        "command": one.command,
        "context": max(one.largest_context, one.max_model_len),
        "gib": gib(one.need.total),
        "tokens_per_second": None if speed is None else msgspec.to_builtins(speed),
    }


if __name__ == "__main__":
    print(json.dumps(plan_this_machine(int(sys.argv[1]))))

"""What else this machine could run, for the page: ``python -m fastqwen.server.operator.planner HELD_BYTES`` prints it as JSON.

A process of its own: planning two hundred models takes a second or two, in which no stream may pause.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
from typing import Any

import msgspec

from fastqwen.errors import FastqwenError
from fastqwen.plan.advice import Answer, gib, list_models
from fastqwen.plan.gpus import Target, find_target
from fastqwen.plan.question import PlanOptions

MODULE = "fastqwen.server.operator.planner"
TIMEOUT_S = 60.0
READING_TOKENS_PER_S = 5.0


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
    """Models that fit and are served, the likeliest wish first."""
    target = _without_us(find_target("auto"), held_bytes)
    running = [one for one in list_models(target, PlanOptions()) if one.fits and one.command and not one.not_served_yet]
    return {"device": target.label, "models": [_row(one) for one in sorted(running, key=_wish, reverse=True)]}


def _without_us(target: Target, held_bytes: int) -> Target:
    facts = target.facts
    free_bytes = min(facts.total_bytes, facts.free_bytes + held_bytes)
    return msgspec.structs.replace(target, facts=msgspec.structs.replace(facts, free_bytes=free_bytes))


def _wish(one: Answer) -> tuple[bool, bool, bool, float, int]:
    """Those that answer, as fast as one reads, of anything; then later generations, then large ones."""
    name = one.model.rsplit("/", 1)[-1]
    numbered = re.match(r"Qwen(\d(?:\.\d)?)", name)
    generation = float(numbered[1]) if numbered else 1.0
    answers = bool(re.search(r"Chat|Instruct|Thinking", name)) or (generation >= 3 and not name.endswith("-Base"))
    is_quick = one.speed_single is None or one.speed_single.low >= READING_TOKENS_PER_S
    return answers, is_quick, not re.search(r"Math|Coder|Guard|1M", name), generation, one.need.weights


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

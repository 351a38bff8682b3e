"""The server's own routes over several engines: a client sees one answer, whatever died behind it."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from fastqwen.cluster.failover import FailoverEngine
from fastqwen.cluster.routing import Router
from fastqwen.server.answer.state import ServerState
from tests.server.harness import assembled, chat, client_of, make_state

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "numbers": {"type": "array", "items": {"type": "integer"}},
    },
    "required": ["name", "numbers"],
    "additionalProperties": False,
}
JSON = {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}}
TOOL = {
    "tools": [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}],
}


def script(prompt: str, seed: int) -> str:
    if "json" in prompt:
        return ("I think so.</think>\n" if "think," in prompt else "") + (
            '{"name": "Grüße", "numbers": [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]}'
        )
    if "tool" in prompt:
        return 'Let me see. <tool_call>{"name": "look", "arguments": {"where": "in the book of numbers"}}</tool_call>'
    return f"A story of {seed}: 你好, 😀 and good bye to all of them."


BODIES: dict[str, dict[str, Any]] = {
    "text": chat("tell", stream=True, seed=5),
    "several": chat("tell", stream=True, n=3, seed=5),
    "logprobs": chat("tell", stream=True, logprobs=True, top_logprobs=2, seed=5),
    "stop": chat("tell", stream=True, stop=["good bye"]),
    "json": chat("json", stream=True, **JSON, chat_template_kwargs={"enable_thinking": False}),
    "thought": chat("think, then json", stream=True, **JSON),  # the grammar begins to hold in the middle
    "tool": chat("tool", stream=True, **TOOL),
}


async def answer(states: list[ServerState], body: dict[str, Any], kill_after: int | None) -> Any:
    """Ask the first state, whose engine is all engines. The one that answers is lost after ``kill_after`` tokens."""
    engines: list[Any] = [state.engine for state in states]
    joined = FailoverEngine(Router())
    tasks = [asyncio.create_task(engine.run()) for engine in engines]
    for index, engine in enumerate(engines):
        joined.add_replica(str(index), engine)

    async def run() -> None:
        """In the place of the engine's own loop: it watches, and kills."""
        while kill_after is None or sum(len(one.said) for one in joined._running.values()) < kill_after:
            await asyncio.sleep(0)
        victims = {int(one.ticket.replica) for one in joined._running.values()}
        victim = min(victims)
        tasks[victim].cancel()
        engines[victim].die()
        await asyncio.sleep(1000)

    joined.run = run  # type: ignore[attr-defined]
    states[0].engine = joined
    async with client_of(states[0]) as client:
        response = await client.post("/v1/chat/completions", content=json.dumps(body).encode())
    for task in tasks:
        task.cancel()
    assert kill_after is None or joined.num_moved > 0
    return assembled(response)


@pytest.mark.parametrize("kill_after", [1, 2, 15, 30])
@pytest.mark.parametrize("kind", BODIES)
def test_the_answer_is_the_same(kind: str, kill_after: int):
    body = BODIES[kind]
    undisturbed = asyncio.run(answer([make_state(script), make_state(script)], body, None))
    disturbed = asyncio.run(answer([make_state(script), make_state(script)], body, kill_after))
    assert disturbed == undisturbed
    assert all(len(one["finish"]) == 1 for one in disturbed.values())
    if kind in ("json", "thought"):
        assert json.loads(disturbed[0]["content"])["numbers"][-3:] == [8, 9, 10]
    if kind == "tool":
        assert disturbed[0]["calls"] and disturbed[0]["finish"] == ["tool_calls"]

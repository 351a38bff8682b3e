"""A thousand answers of any bytes: streamed or not, with stop strings or without, the text is the same."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import httpx

from tests.server.harness import chat, chunks, client_of, make_state

COUNT = 1000
PIECES = ["a", "ab", " ", "\n", "é", "中文", "🙂", "🤷🏽‍♀️", "\u0301", "\u3000", "</", "<", "STOP", "ST"]


def answer(seed: int) -> bytes:
    """Mostly text; every third one with bytes that are no text."""
    rng = random.Random(seed)
    parts = [rng.choice(PIECES).encode() for _ in range(rng.randint(1, 20))]
    if seed % 3 == 0:
        parts.insert(rng.randrange(len(parts)), rng.randbytes(rng.randint(1, 4)).replace(b"\n", b"\xff"))
    return b"".join(parts)


def stops(seed: int) -> list[str]:
    rng = random.Random(~seed)
    return [] if seed % 2 else rng.sample(["STOP", "ab", "中", "🙂a", "</x", "\n\n", "é"], rng.randint(1, 3))


async def one(client: httpx.AsyncClient, seed: int) -> None:
    wanted = stops(seed)
    body: dict[str, Any] = {
        "prompt": "x",
        "seed": seed,
        "temperature": 1.0,
        "max_tokens": 400,
        **({"stop": wanted} if wanted else {}),
    }
    path = "/v1/completions"
    if seed % 5 == 0:
        path, body = "/v1/chat/completions", {**chat("x"), **{key: body[key] for key in body if key != "prompt"}}
    [choice] = (await client.post(path, json=body)).json()["choices"]
    whole = choice["text"] if "text" in choice else choice["message"]["content"]
    events = [event["choices"][0] for event in chunks(await client.post(path, json={**body, "stream": True}))]
    streamed = "".join(event["text"] if "text" in event else event["delta"].get("content", "") for event in events)
    reasons = [event["finish_reason"] for event in events if event["finish_reason"]]
    assert streamed == whole, seed
    assert reasons == [choice["finish_reason"]] == ["stop"], seed
    plain = answer(seed).decode("utf-8", "replace")
    assert whole.count("\ufffd") <= plain.count("\ufffd"), seed
    if path == "/v1/completions":  # a chat's text is parsed, and loses white space around it
        assert plain.startswith(whole) and not any(stop in whole for stop in wanted), seed
        assert whole == plain or any(plain.startswith(stop, len(whole)) for stop in wanted), seed


def test_a_thousand_answers_of_any_bytes():
    async def run() -> None:
        async with client_of(make_state(lambda prompt, seed: answer(seed))) as client:
            for start in range(0, COUNT, 20):
                await asyncio.gather(*(one(client, seed) for seed in range(start, start + 20)))

    asyncio.run(run())

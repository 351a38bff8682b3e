"""The newer APIs beside the chat: Anthropic's messages and OpenAI's responses, and what they remember."""

from __future__ import annotations

import json
from typing import Any

from fastqwen.terminal.conformance.server import PROMPT, Missing, Server, demand, message_of

MESSAGES, RESPONSES = "/v1/messages", "/v1/responses"


def _events(server: Server, path: str, **body: Any) -> list[dict[str, Any]]:
    with server.http.stream("POST", path, json={"model": server.model, "stream": True, **body}) as response:
        response.read()
        if response.status_code != 200:
            raise Missing(f"{path} was answered with {response.status_code}: {message_of(response)}")
        data = [line[5:].strip() for line in response.text.splitlines() if line.startswith("data:")]
    return [json.loads(one) for one in data if one != "[DONE]"]


def _whole(server: Server, path: str, **body: Any) -> dict[str, Any]:
    response = server.post(path, **body)
    if response.status_code != 200:
        raise Missing(f"{path} was answered with {response.status_code}: {message_of(response)}")
    found: dict[str, Any] = response.json()
    return found


def messages_streamed(server: Server) -> str:
    """Blocks that begin, grow and end, one after the other; thinking comes with a signature, as it does when whole."""
    body = {"messages": PROMPT, "max_tokens": 40, "temperature": 0}
    whole, events = _whole(server, MESSAGES, **body), _events(server, MESSAGES, **body)
    kinds = [event["type"] for event in events if event["type"] != "ping"]
    demand(
        kinds[0] == "message_start" and kinds[-1] == "message_stop", f"begins with {kinds[0]}, ends with {kinds[-1]}"
    )
    blocks: list[dict[str, str]] = []
    for event in events:
        if event["type"] == "content_block_start":
            demand(event["index"] == len(blocks), f"block {event['index']} after {len(blocks)} blocks")
            blocks.append({"type": event["content_block"]["type"]})
        elif event["type"] == "content_block_delta":
            for key in ("text", "thinking", "signature"):
                blocks[-1][key] = blocks[-1].get(key, "") + event["delta"].get(key, "")
    for streamed, block in zip(blocks, whole["content"], strict=False):
        for key in ("text", "thinking", "signature"):
            demand(not block.get(key) or streamed.get(key) == block[key], f"{key} is another one when it is streamed")
    demand(len(blocks) == len(whole["content"]), f"{len(blocks)} blocks streamed, {len(whole['content'])} whole")
    return f"{len(blocks)} block(s)"


def messages_errors(server: Server) -> str:
    """In Anthropic's envelope and with its names, or its clients cannot tell what happened."""
    response = server.post(MESSAGES, messages=[], max_tokens=4)
    if response.status_code == 404:
        raise Missing(f"no {MESSAGES}")
    found = response.json()
    demand(400 <= response.status_code < 500, f"no messages at all were answered with {response.status_code}")
    demand(found.get("type") == "error", "the envelope has no type error")
    kind = (found.get("error") or {}).get("type")
    demand(kind == "invalid_request_error", f"error.type is {kind!r}")
    return str(kind)


def responses_streamed(server: Server) -> str:
    body = {"input": PROMPT, "max_output_tokens": 40, "temperature": 0}
    whole, events = _whole(server, RESPONSES, **body), _events(server, RESPONSES, **body)
    numbers = [event["sequence_number"] for event in events]
    demand(numbers == list(range(numbers[0], numbers[0] + len(numbers))), "sequence_number leaves gaps")
    demand(events[0]["type"] == "response.created", f"begins with {events[0]['type']}")
    last = events[-1]["response"]["output"]
    for kind in ("output_text", "reasoning_text"):
        grown = "".join(event["delta"] for event in events if event["type"] == f"response.{kind}.delta")
        for name, output in (("whole", whole["output"]), ("at the end", last)):
            parts = [part for item in output for part in item.get("content") or [] if part["type"] == kind]
            demand("".join(part["text"] for part in parts) == grown, f"{kind} streamed is not the one that is {name}")
    return f"{len(events)} events"


def responses_remembered(server: Server) -> str:
    """A conversation goes on by its id and by references to its items, but not where ``store`` was false."""
    more = {"max_output_tokens": 16, "temperature": 0}
    first = _whole(server, RESPONSES, input=PROMPT, **more)
    on = server.post(RESPONSES, input="Go on.", previous_response_id=first["id"], **more)
    if on.status_code != 200:
        raise Missing(f"previous_response_id: {message_of(on)}")
    demand(on.json()["usage"]["input_tokens"] > first["usage"]["input_tokens"], "previous_response_id is ignored")
    reference = {"type": "item_reference", "id": first["output"][-1]["id"]}
    by_item = server.post(RESPONSES, input=[*PROMPT, reference, *PROMPT], **more)
    if by_item.status_code != 200:
        raise Missing(f"item_reference: {message_of(by_item)}")
    unkept = _whole(server, RESPONSES, input=PROMPT, store=False, **more)
    status = server.post(RESPONSES, input="Go on.", previous_response_id=unkept["id"], **more).status_code
    demand(status in (400, 404), f"store was false, and its id was answered with {status}")
    return "ids, references, store"

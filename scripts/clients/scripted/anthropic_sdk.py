"""The anthropic client: a streamed call with thinking, its result, the second turn, a count."""

import sys

import anthropic
from say import FIRST, LAST

client = anthropic.Anthropic(base_url=sys.argv[1].removesuffix("/v1"), api_key="none")
tools = [{"name": "weather", "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}}}]
messages = [{"role": "user", "content": FIRST}]
more = {"model": "m", "max_tokens": 300, "tools": tools, "system": "Be brief."}
with client.messages.stream(messages=messages, **more) as stream:
    first = stream.get_final_message()
thinking, use = first.content
assert thinking.type == "thinking" and thinking.signature and first.stop_reason == "tool_use", first
assert (use.name, use.input) == ("weather", {"city": "Bern"}), use
messages += [
    {"role": "assistant", "content": [block.model_dump() for block in first.content]},
    {"role": "user", "content": [{"type": "tool_result", "tool_use_id": use.id, "content": LAST}]},
]
last = client.messages.create(messages=messages, **more)
assert last.content[-1].text == "It is sunny." and last.stop_reason == "end_turn", last
assert client.messages.count_tokens(model="m", messages=messages, tools=tools).input_tokens > 50
try:
    client.messages.create(model="m", max_tokens=-1, messages=messages)
except anthropic.BadRequestError as error:
    assert error.body["error"]["type"] == "invalid_request_error", error.body
print("anthropic: ok")

"""The current openai client: chat, responses, tools, a schema."""

import json
import sys

import openai

client = openai.OpenAI(base_url=sys.argv[1], api_key="none")
messages = [{"role": "user", "content": "Invent a person."}]
schema = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 1, "maximum": 99},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
wish = {"type": "json_schema", "json_schema": {"name": "person", "schema": schema, "strict": True}}
found = client.chat.completions.create(model="Qwen", messages=messages, response_format=wish, max_tokens=200)
assert set(json.loads(found.choices[0].message.content)) == {"name", "age"}
chunks = list(client.chat.completions.create(model="Qwen", messages=messages, max_tokens=12, stream=True))
assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1]
assert client.responses.create(model="Qwen", input="Hi", max_output_tokens=8).output_text
print("openai, current: ok")

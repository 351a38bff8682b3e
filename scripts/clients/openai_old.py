"""openai 0.28, as people used it with FastChat: streamed and whole, stop words, an extra argument in the body."""

import sys

import openai

openai.api_base, openai.api_key = sys.argv[1], "none"
messages = [{"role": "user", "content": "Count from one to five."}]
streamed = ""
for chunk in openai.ChatCompletion.create(
    model="Qwen", messages=messages, stream=True, stop_token_ids=[2], temperature=0, max_tokens=30
):
    if hasattr(chunk.choices[0].delta, "content"):
        assert chunk.choices[0].delta.content is not None
        streamed += chunk.choices[0].delta.content
whole = openai.ChatCompletion.create(
    model="Qwen", messages=messages, stream=False, stop=[], temperature=0, max_tokens=30
)
assert whole.choices[0].message.content == streamed and streamed
stopped = openai.ChatCompletion.create(
    model="Qwen", messages=messages, stop=[streamed[3:6]], temperature=0, max_tokens=30
)
assert stopped.choices[0].message.content == streamed[: streamed.find(streamed[3:6])]
print("openai 0.28: ok")

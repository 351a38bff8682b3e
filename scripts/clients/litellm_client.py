"""litellm: whole and streamed."""

import os
import sys

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # or its import asks for a price list in the net

import litellm

options = {
    "model": "openai/Qwen",
    "api_base": sys.argv[1],
    "api_key": "none",
    "messages": [{"role": "user", "content": "Say hello."}],
    "temperature": 0,
    "max_tokens": 20,
}
whole = litellm.completion(**options).choices[0].message.content
assert whole
assert "".join(part.choices[0].delta.content or "" for part in litellm.completion(**options, stream=True)) == whole
print("litellm: ok")

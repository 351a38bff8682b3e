"""langchain-openai: invoke, stream, batch."""

import sys

from langchain_openai import ChatOpenAI

model = ChatOpenAI(base_url=sys.argv[1], api_key="none", model="Qwen", temperature=0, max_tokens=20)
whole = model.invoke("Say hello.").content
assert whole
assert "".join(chunk.content for chunk in model.stream("Say hello.")) == whole
assert len(model.batch(["Hi", "Hello"])) == 2
print("langchain-openai: ok")

"""llama-index's OpenAILike: complete, chat, stream."""

import sys
from pathlib import Path

sys.path = [one for one in sys.path if Path(one).resolve() != Path(__file__).parent.resolve()]  # this file has its name

from llama_index.core.llms import ChatMessage  # noqa: E402
from llama_index.llms.openai_like import OpenAILike  # noqa: E402

model = OpenAILike(api_base=sys.argv[1], api_key="none", model="Qwen", is_chat_model=True, temperature=0, max_tokens=20)
whole = model.chat([ChatMessage(role="user", content="Say hello.")]).message.content
assert whole
assert "".join(part.delta for part in model.stream_chat([ChatMessage(role="user", content="Say hello.")])) == whole
print("llama-index OpenAILike: ok")

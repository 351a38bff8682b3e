"""pydantic-ai: a tool loop of two steps, on the chat and on the newer API."""

import sys

from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider
from say import FIRST, LAST

provider = OpenAIProvider(base_url=sys.argv[1], api_key="none")


def loop(kind):
    agent = Agent(kind("m", provider=provider))
    asked = []

    @agent.tool_plain
    def weather(city: str) -> str:
        asked.append(city)
        return LAST

    assert agent.run_sync(FIRST).output == "It is sunny." and asked == ["Bern"], (kind, asked)


loop(OpenAIChatModel)
loop(OpenAIResponsesModel)
print("pydantic-ai: ok")

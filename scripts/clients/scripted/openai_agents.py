"""openai-agents: a tool loop of two steps, on the chat and on the newer API."""

import asyncio
import sys

from agents import Agent, OpenAIChatCompletionsModel, OpenAIResponsesModel, Runner, function_tool, set_tracing_disabled
from openai import AsyncOpenAI
from say import FIRST, LAST

set_tracing_disabled(True)
client = AsyncOpenAI(base_url=sys.argv[1], api_key="none")


@function_tool
def weather(city: str) -> str:
    assert city == "Bern"
    return LAST


async def main() -> None:
    for kind in (OpenAIChatCompletionsModel, OpenAIResponsesModel):
        agent = Agent(name="a", instructions="Be brief.", tools=[weather], model=kind(model="m", openai_client=client))
        found = await Runner.run(agent, FIRST)
        assert found.final_output == "It is sunny.", (kind, found.final_output)


asyncio.run(main())
print("openai-agents: ok")

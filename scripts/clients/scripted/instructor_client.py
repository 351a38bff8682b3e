"""instructor: an object by a tool, by a schema and by the newer API."""

import sys

import instructor
import openai
from pydantic import BaseModel
from say import say


class City(BaseModel):
    name: str
    people: int


client = openai.OpenAI(base_url=sys.argv[1], api_key="none")
plain = '{"name": "Bern", "people": 130000}'
call = f'<tool_call>\n{{"name": "City", "arguments": {plain}}}\n</tool_call>'
for mode, said in (
    (instructor.Mode.TOOLS, call),
    (instructor.Mode.JSON_SCHEMA, plain),
    (instructor.Mode.JSON, plain),
    (instructor.Mode.RESPONSES_TOOLS, call),
):
    wrapped = instructor.from_openai(client, mode=mode)
    # Where a form is asked for, the prompt ends inside the thinking, and the form holds behind it.
    messages = [{"role": "user", "content": say("Hm.\n</think>\n\n" + said)}]
    found = wrapped.chat.completions.create(model="m", messages=messages, response_model=City, max_retries=0)
    assert (found.name, found.people) == ("Bern", 130000), (mode, found)
print("instructor: ok")

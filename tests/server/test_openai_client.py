"""The official client as an oracle: it must be able to read everything we say."""

from __future__ import annotations

import json
from collections.abc import Iterator

import openai
import pydantic
import pytest

from tests.reliability.mock_model import make_model
from tests.reliability.server import Server, serving


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(make_model(tmp_path_factory.mktemp("model")), step_s=0.0) as found:
        yield found


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


MESSAGES: list = [{"role": "user", "content": "hi"}]


def test_models(client: openai.OpenAI):
    [model] = client.models.list().data
    assert client.models.retrieve(model.id).id == model.id


def test_chat_streamed_and_whole(client: openai.OpenAI):
    options: dict = {"model": "Qwen", "messages": MESSAGES, "max_tokens": 8, "seed": 1}
    whole = client.chat.completions.create(**options, logprobs=True, top_logprobs=0)
    assert whole.usage is not None and whole.usage.completion_tokens == 8
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage is not None and chunks[-1].usage.total_tokens == whole.usage.total_tokens


def test_extra_arguments_go_through(client: openai.OpenAI):
    extra = {"stop_token_ids": [258], "top_k": 5, "repetition_penalty": 1.1, "cache_salt": "x"}
    found = client.chat.completions.create(model="Qwen", messages=MESSAGES, max_tokens=2, extra_body=extra)
    assert found.choices[0].finish_reason == "length"


def test_completions(client: openai.OpenAI):
    found = client.completions.create(model="Qwen", prompt=["a", "b"], max_tokens=3, n=2, echo=True, seed=3)
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    assert [choice.text[0] for choice in found.choices] == ["a", "a", "b", "b"]


def test_responses_streamed_and_whole(client: openai.OpenAI):
    whole = client.responses.create(model="Qwen", input="hi", max_output_tokens=6)
    assert whole.status == "incomplete" and len(whole.output_text) == 6
    events = list(client.responses.create(model="Qwen", input="hi", max_output_tokens=6, stream=True))
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert len(text) == 6
    assert events[-1].type == "response.incomplete"


def test_errors_have_the_clients_own_types(client: openai.OpenAI):
    with pytest.raises(openai.BadRequestError) as found:
        client.chat.completions.create(model="Qwen", messages=MESSAGES, temperature=-1)
    assert found.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as found:
        client.chat.completions.create(model="Qwen", messages=[{"role": "user", "content": "x" * 9000}])
    assert found.value.code == "context_length_exceeded"


class Person(pydantic.BaseModel):
    name: str


def test_a_schema_reaches_the_server_as_the_client_sends_it(client: openai.OpenAI):
    """The mock cannot be constrained: its engine ends the request, and says so, instead of answering anything."""
    schema = {"type": "json_schema", "json_schema": {"name": "p", "schema": Person.model_json_schema(), "strict": True}}
    bad = json.loads(json.dumps(schema))
    bad["json_schema"]["schema"]["type"] = "no-such-type"
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model="Qwen", messages=MESSAGES, response_format=bad, max_tokens=3)

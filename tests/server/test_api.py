"""What clients see: the same answer streamed or whole, and every option doing what its name says."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.server.live import LiveServer, eventually

DAYS = [{"role": "user", "content": "List the days of the week."}]
STORY = [{"role": "user", "content": "Tell me a long story about a lighthouse."}]
GREEDY: dict[str, Any] = {"model": "demo", "temperature": 0}


def text_of(stream: Any) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0, "max_tokens": 60},
        {"temperature": 0.9, "top_p": 0.9, "seed": 7, "max_tokens": 40},
        {"temperature": 1.5, "seed": 3, "max_tokens": 40, "extra_body": {"top_k": 30, "min_p": 0.02}},
        {"temperature": 0.7, "seed": 4, "max_tokens": 40, "presence_penalty": 1.0, "frequency_penalty": 0.5},
        {"temperature": 0, "max_tokens": 40, "extra_body": {"repetition_penalty": 1.3, "min_tokens": 40}},
    ],
)
def test_streamed_and_whole_answers_are_equal(server: LiveServer, options: dict[str, Any]):
    create = server.client.chat.completions.create
    whole = create(model="demo", messages=STORY, **options)
    chunks = list(create(model="demo", messages=STORY, stream=True, **options))
    assert text_of(chunks) == whole.choices[0].message.content
    reasons = [chunk.choices[0].finish_reason for chunk in chunks]
    assert reasons[-1] == whole.choices[0].finish_reason
    assert set(reasons[:-1]) == {None}
    assert {chunk.id for chunk in chunks} == {chunks[0].id}


def test_usage(server: LiveServer):
    create = server.client.chat.completions.create
    whole = create(messages=DAYS, max_tokens=10, **GREEDY)
    assert (whole.usage.completion_tokens, whole.usage.total_tokens) == (10, whole.usage.prompt_tokens + 10)
    assert all(chunk.usage is None for chunk in create(messages=DAYS, max_tokens=10, stream=True, **GREEDY))
    asked = list(create(messages=DAYS, max_tokens=10, stream=True, stream_options={"include_usage": True}, **GREEDY))
    assert asked[-1].choices == []
    assert asked[-1].usage.model_dump(exclude={"prompt_tokens_details"}) == whole.usage.model_dump(
        exclude={"prompt_tokens_details"}
    )
    assert all(chunk.usage is None for chunk in asked[:-1])
    every = list(
        create(
            messages=DAYS,
            max_tokens=10,
            stream=True,
            stream_options={"include_usage": True, "continuous_usage_stats": True},
            **GREEDY,
        )
    )
    counts = [chunk.usage.completion_tokens for chunk in every if chunk.usage]
    assert counts == sorted(counts) and counts[-1] == 10


@pytest.mark.parametrize("where", [slice(0, 1), slice(9, 12), slice(14, 31)])
def test_no_piece_of_a_stop_string_leaks(server: LiveServer, where: slice):
    """Stop strings cut out of the answer itself, so that they begin and end inside tokens."""
    create = server.client.chat.completions.create
    full = create(messages=DAYS, max_tokens=16, **GREEDY).choices[0].message.content
    for stops in ([full[where]], ["xyzzy", full[where] + "never", full[where], full[where][:-1] or "M"]):
        cut = min(full.find(stop) for stop in stops if stop in full)
        whole = create(messages=DAYS, max_tokens=16, stop=stops, **GREEDY)
        streamed = list(create(messages=DAYS, max_tokens=16, stop=stops, stream=True, **GREEDY))
        assert whole.choices[0].message.content == text_of(streamed) == full[:cut]
        assert whole.choices[0].finish_reason == streamed[-1].choices[0].finish_reason == "stop"
        assert whole.choices[0].model_extra["stop_reason"] in stops


def test_text_that_only_begins_like_a_stop_string_is_not_lost(server: LiveServer):
    create = server.client.chat.completions.create
    full = create(messages=DAYS, max_tokens=12, **GREEDY).choices[0].message.content
    stops = [full[-3:] + "never", full[-1:] + "nor this"]
    streamed = text_of(create(messages=DAYS, max_tokens=12, stop=stops, stream=True, **GREEDY))
    assert streamed == full


def test_the_stop_string_stays_if_asked(server: LiveServer):
    answer = server.client.chat.completions.create(
        messages=DAYS, max_tokens=40, stop="day", extra_body={"include_stop_str_in_output": True}, **GREEDY
    )
    assert answer.choices[0].message.content.endswith("day")
    assert answer.choices[0].message.content.count("day") == 1


def test_stop_token_ids(server: LiveServer):
    full = server.client.completions.create(prompt="One two three", max_tokens=12, logprobs=0, **GREEDY).choices[0]
    ids = server.http.post("/tokenize", json={"prompt": full.text}).json()["tokens"]
    found = server.client.completions.create(
        prompt="One two three", max_tokens=12, extra_body={"stop_token_ids": [ids[4]]}, **GREEDY
    )
    first = ids.index(ids[4])
    assert found.usage.completion_tokens == first + 1
    assert found.choices[0].finish_reason == "stop"
    assert found.choices[0].model_extra["stop_reason"] == ids[4]


def test_n_answers_with_a_seed_are_two_and_repeat(server: LiveServer):
    def ask(**options: Any) -> list[str]:
        answer = server.client.chat.completions.create(
            model="demo", messages=STORY, n=2, seed=11, temperature=1.0, max_tokens=24, **options
        )
        assert [choice.index for choice in answer.choices] == [0, 1]
        assert answer.usage.completion_tokens == 48
        return [choice.message.content for choice in answer.choices]

    first = ask()
    assert first[0] != first[1]
    assert ask() == first
    streamed = ["", ""]
    for chunk in server.client.chat.completions.create(
        model="demo", messages=STORY, n=2, seed=11, temperature=1.0, max_tokens=24, stream=True
    ):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == first


def test_without_a_seed_answers_differ(server: LiveServer):
    create = server.client.chat.completions.create
    answers = {
        create(model="demo", messages=STORY, temperature=1.2, max_tokens=24).choices[0].message.content
        for _ in range(3)
    }
    assert len(answers) == 3


def test_chat_logprobs(server: LiveServer):
    create = server.client.chat.completions.create
    options: dict[str, Any] = {"messages": DAYS, "max_tokens": 8, "logprobs": True, "top_logprobs": 4, **GREEDY}
    whole = create(**options).choices[0]
    entries = whole.logprobs.content
    assert "".join(entry.token for entry in entries) == whole.message.content
    for entry in entries:
        assert bytes(entry.bytes).decode() == entry.token
        top = [one.logprob for one in entry.top_logprobs]
        assert len(top) == 4 and top == sorted(top, reverse=True)
        assert entry.top_logprobs[0].token == entry.token, "greedy takes the most likely token"
        assert entry.logprob == top[0] <= 0
    streamed = [
        entry
        for chunk in create(stream=True, **options)
        if chunk.choices and chunk.choices[0].logprobs
        for entry in chunk.choices[0].logprobs.content
    ]
    assert [entry.model_dump() for entry in streamed] == [entry.model_dump() for entry in entries]


def test_prompts_as_texts_and_as_ids(server: LiveServer):
    create = server.client.completions.create
    texts = ["The capital of France is", "Two and two make"]
    ids = [server.http.post("/tokenize", json={"prompt": text}).json()["tokens"] for text in texts]
    alone = [create(prompt=text, max_tokens=6, **GREEDY).choices[0].text for text in texts]
    for prompt in (texts, ids):
        answer = create(prompt=prompt, max_tokens=6, **GREEDY)
        assert [choice.index for choice in answer.choices] == [0, 1]
        assert [choice.text for choice in answer.choices] == alone
        assert answer.usage.prompt_tokens == sum(map(len, ids))
    assert create(prompt=ids[0], max_tokens=6, **GREEDY).choices[0].text == alone[0]
    several = create(prompt=texts, n=2, max_tokens=6, **GREEDY)
    assert [choice.text for choice in several.choices] == [alone[0], alone[0], alone[1], alone[1]]


def test_echo(server: LiveServer):
    create = server.client.completions.create
    plain = create(prompt="The capital of France is", max_tokens=5, logprobs=2, **GREEDY).choices[0]
    echoed = create(prompt="The capital of France is", max_tokens=5, logprobs=2, echo=True, **GREEDY).choices[0]
    assert echoed.text == "The capital of France is" + plain.text
    assert "".join(echoed.logprobs.tokens) == echoed.text
    assert echoed.logprobs.token_logprobs[0] is None
    assert echoed.logprobs.token_logprobs[-5:] == plain.logprobs.token_logprobs
    assert echoed.logprobs.text_offset[-1] == len(echoed.text) - len(echoed.logprobs.tokens[-1])
    streamed = create(prompt="The capital of France is", max_tokens=5, echo=True, stream=True, **GREEDY)
    assert "".join(chunk.choices[0].text for chunk in streamed) == echoed.text


def test_the_second_question_finds_the_first_in_the_prefix_cache(server: LiveServer):
    long = [{"role": "user", "content": "Here is a list: " + ", ".join(map(str, range(80))) + ". What is next?"}]
    first, second = (server.client.chat.completions.create(messages=long, max_tokens=4, **GREEDY) for _ in range(2))
    assert second.usage.prompt_tokens_details.cached_tokens > 0.8 * second.usage.prompt_tokens
    assert second.choices[0].message.content == first.choices[0].message.content


def test_sixty_four_streams_at_once(server: LiveServer):
    """Each gets the answer that it would get alone, and no block is left behind."""

    async def ask(client: Any, number: int) -> tuple[str, str]:
        text, reason = "", ""
        stream = await client.chat.completions.create(
            messages=[{"role": "user", "content": f"Count from {number} to {number + 20}."}],
            stream=True,
            max_tokens=16,
            **GREEDY,
        )
        async for chunk in stream:
            text += chunk.choices[0].delta.content or ""
            reason = chunk.choices[0].finish_reason or reason
        return text, reason

    async def ask_all() -> list[tuple[str, str]]:
        async with server.async_client as client:
            return await asyncio.gather(*[ask(client, number) for number in range(64)])

    answers = asyncio.run(ask_all())
    assert {reason for _, reason in answers} <= {"stop", "length"}
    eventually(server.is_idle, 3, "an empty engine")
    for number in (0, 31, 63):
        [alone] = server.client.chat.completions.create(
            messages=[{"role": "user", "content": f"Count from {number} to {number + 20}."}], max_tokens=16, **GREEDY
        ).choices
        assert answers[number] == (alone.message.content, alone.finish_reason)


def test_a_client_that_leaves_ends_the_work(server: LiveServer):
    with server.client.chat.completions.create(messages=STORY, max_tokens=4000, stream=True, **GREEDY) as stream:
        next(stream), next(stream), next(stream)
        eventually(lambda: server.metric("num_requests_running") == 1, 2)
    assert eventually(server.is_idle, 3, "an abort") <= 1.0


def test_a_client_that_leaves_without_streaming_ends_the_work(server: LiveServer):
    body = {"model": "demo", "messages": STORY, "max_tokens": 4000, "temperature": 0}
    import httpx

    with pytest.raises(httpx.ReadTimeout):
        server.http.post("/v1/chat/completions", json=body, timeout=httpx.Timeout(5, read=1.0))
    assert eventually(server.is_idle, 3, "an abort") <= 1.0


def test_the_server_says_what_it_is(server: LiveServer):
    [model] = server.client.models.list().data
    assert (model.id, model.model_extra["max_model_len"]) == ("demo", 8192)
    assert server.http.get("/health").status_code == 200
    assert set(server.http.get("/version").json()) == {"version"}
    schema = server.http.get("/openapi.json").json()
    assert "/v1/chat/completions" in schema["paths"]
    assert '"POST /v1/chat/completions HTTP/1.1" 200 OK' in server.log

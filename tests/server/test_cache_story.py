"""Scripted turns, and the cause that each of them is told."""

from __future__ import annotations

import asyncio

from fastqwen.server.answer.cache_story import CacheStories
from tests.server.harness import client_of, make_state
from tests.server.hybrid_templates import WITH_EFFORT

LONG = "A system message that is longer than one block of the cache. " * 3
TOOL = {"type": "function", "function": {"name": "add", "description": "adds " * 20, "parameters": {"type": "object"}}}


def causes(*bodies: dict, said: str = "Hello", **state_options) -> list[tuple[str, int | None]]:
    async def run() -> list:
        state = make_state(lambda prompt, seed: said, **state_options)
        found = []
        async with client_of(state) as client:
            for body in bodies:
                answer = await client.post("/v1/chat/completions?explain_cache=1", json={"max_tokens": 40, **body})
                story, timing = answer.json()["cache"], answer.json()["timing"]
                assert set(timing) == {"waited_s", "read_s", "wrote_s"} and min(timing.values()) >= 0
                assert story["cached_tokens"] == answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
                found.append((story["cause"], story["message_index"]))
        return found

    return asyncio.run(run())


def turns(*contents: str, system: str = LONG, **more) -> dict:
    roles = ["user", "assistant"] * len(contents)
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    return {"messages": [{"role": "system", "content": system}, *messages], **more}


def test_the_same_again_is_a_hit():
    assert causes(turns("hi"), turns("hi")) == [("first_request", None), ("hit", None)]


def test_going_on_reuses_everything_before():
    assert causes(turns("hi"), turns("hi", "Hello", "and now something much longer than a block")) == [
        ("first_request", None),
        ("new_text", None),
    ]


def test_thinking_that_the_template_strips():
    first = turns("hi there, how is it going today?")
    second = turns("hi there, how is it going today?", "Hello", "more")
    said = "<think>" + "hm, what do I say? " * 1 + "</think>Hello"
    assert causes(first, second, said=said)[1] == ("thinking_stripped", 2)


def test_every_way_to_ask_explains_itself():
    """A conversation begun over one route is compared with what came over another; a stream tells it at its end."""
    chat = turns("hi", "Hello", "and now something much longer than a block")
    first, rest = chat["messages"][0]["content"], chat["messages"][1:]

    async def run() -> list:
        state = make_state(lambda prompt, seed: "Hello")
        found = []
        async with client_of(state) as client:
            for path, body in (
                ("/v1/chat/completions", turns("hi", max_tokens=40)),
                ("/v1/messages", {"system": first, "messages": rest, "max_tokens": 40}),
                ("/v1/responses", {"instructions": first, "input": rest}),
                ("/v1/completions", {"prompt": "x" * 40, "max_tokens": 9}),
                ("/v1/completions", {"prompt": "x" * 40, "max_tokens": 9}),
            ):
                answer = await client.post(path, json=body, headers={"x-explain-cache": "1"})
                found.append(answer.json()["cache"]["cause"])
            for path, body in (
                ("/v1/messages", {"system": first, "messages": rest, "max_tokens": 40}),
                ("/v1/responses", {"instructions": first, "input": rest}),
                ("/v1/completions", {"prompt": "x" * 40, "max_tokens": 9}),
            ):
                stream = await client.post(f"{path}?explain_cache=1", json={**body, "stream": True})
                assert stream.text.count('"cause":"hit"') == 1
            silent = await client.post("/v1/messages", json={"messages": rest, "max_tokens": 9})
            assert "cache" not in silent.json()
            many = await client.post("/v1/completions?explain_cache=1", json={"prompt": ["a", "b"]})
            assert (many.status_code, many.json()["error"]["param"]) == (400, "explain_cache")
        return found

    assert asyncio.run(run()) == ["first_request", "new_text", "hit", "first_request", "hit"]


def test_changed_tools_and_changed_system_message():
    assert causes(turns("hi", tools=[TOOL]), turns("hi"))[1] == ("tools_changed", None)
    assert causes(turns("hi"), turns("hi", system="Today is Tuesday. " + LONG))[1] == ("system_changed", 0)


def test_an_edited_message():
    assert causes(turns("one", "two", "three"), turns("other", "two", "three"))[1] == ("message_changed", 1)


def test_another_question_is_no_changed_message():
    assert causes(turns("one"), turns("other"))[1] == ("new_text", None)


def test_another_salt():
    assert causes(turns("hi", cache_salt="a"), turns("hi", cache_salt="b"))[1] == ("other_salt", None)


def test_evicted_blocks():
    others = [turns(f"{number} " * 30, system=f"{number}" * 300) for number in range(4)]
    found = causes(turns("hi"), *others, turns("hi"), max_model_len=1024, blocks=64)
    assert found[-1] == ("evicted", None)


def test_a_state_that_was_not_kept():
    """The same for a model whose layers keep a state: its blocks may be there, what is missing is a copy of that."""
    stories = CacheStories(enabled=True)
    for token_ids, num_cached in (([1] * 40, 0), ([1] * 32 + [2] * 8, 0)):
        story = stories.begin(token_ids, "")
        found = stories.end(
            story, [], thought=False, num_cached=num_cached, block_size=16, explain=True, has_states=True
        )
    assert found is not None and found["cause"] == "state_not_kept" and found["equal_tokens"] == 32


def cached(*bodies: dict, said: str, **state_options) -> list[tuple[str, int, int]]:
    """Of each turn its cause, and how many of its prompt's tokens usage says were found."""

    async def run() -> list:
        state, found = make_state(lambda prompt, seed: said, **state_options), []
        async with client_of(state) as client:
            for body in bodies:
                answer = (await client.post("/v1/chat/completions?explain_cache=1", json=body)).json()
                usage = answer["usage"]
                number = usage["prompt_tokens_details"]["cached_tokens"]
                assert answer["cache"]["cached_tokens"] == number
                found.append((answer["cache"]["cause"], number, usage["prompt_tokens"]))
        return found

    return asyncio.run(run())


def test_the_second_turn_of_a_model_with_states_finds_all_of_the_first():
    """Prompt and answer up to the last block's end, as without states; so does the same prompt again."""
    said = "Hm.\n</think>\n\nHello, this is an answer that is longer than a block."
    answer = {"role": "assistant", "content": said.partition("</think>\n\n")[2], "reasoning_content": "Hm."}
    first = {"messages": turns("hi")["messages"], "max_tokens": 90}
    second = {"messages": [*first["messages"], answer, {"role": "user", "content": "and now more"}], "max_tokens": 5}
    for snapshots in (None, 8):
        found = cached(first, first, second, said=said, template=WITH_EFFORT, snapshots=snapshots)
        assert [cause for cause, *_ in found] == ["first_request", "hit", "new_text"]
        (_, none, length), (_, again, _), (_, hit, _) = found
        assert none == 0 and again == (length - 1) // 16 * 16
        assert hit >= (length + len(said)) // 16 * 16 - 32


def test_a_branch_is_told_as_not_kept_once_and_found_from_then_on():
    bodies = [turns(text + "x" * 40, max_tokens=3) for text in ("a", "b", "c")]
    (_, first, _), (cause, second, _), (_, third, _) = cached(*bodies, said="Hello", snapshots=8)
    assert first == second == 0 and cause == "state_not_kept" and third > 100


def test_without_copies_a_model_with_states_finds_nothing_and_says_why():
    found = cached(turns("hi"), turns("hi"), said="Hello", snapshots=0)
    assert [(cause, number) for cause, number, _ in found] == [("first_request", 0), ("state_not_kept", 0)]


def test_too_short_for_a_block():
    short = {"messages": [{"role": "user", "content": ""}], "add_generation_prompt": False, "max_tokens": 1}
    long = {"messages": [{"role": "user", "content": ""}, {"role": "user", "content": "x" * 60}], "max_tokens": 1}
    template = "{% for m in messages %}{{ m.content or 'a' }}{% endfor %}"
    assert causes(short, long, template=template)[1] == ("sub_block", None)


def test_a_cache_that_is_off():
    assert causes(turns("hi"), turns("hi"), engine={"enable_prefix_caching": False})[1] == ("disabled", None)

"""Fields that vLLM's clients send, and what they read in the answers."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.server.harness import END, VOCAB, ask, assembled, chat, chunks, get, make_state

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
BEGUN = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Sure"}]}


def answer(path: str, body: dict[str, Any], **server: Any) -> dict[str, Any]:
    response = ask(make_state(**server), path, body)
    assert response.status_code == 200, response.text
    return response.json()


def test_fields_that_clients_read_without_asking_are_there():
    for path, body in ((CHAT, chat()), (COMPLETIONS, {"prompt": "hi"})):
        found = answer(path, body)
        assert found["system_fingerprint"] is found["prompt_logprobs"] is found["service_tier"] is None
    assert answer(CHAT, chat())["choices"][0]["message"]["reasoning"] is None
    tool = {"type": "function", "function": {"name": "add"}}
    assert answer(CHAT, {**chat(), "tools": [tool]})["choices"][0]["message"]["tool_calls"] == []


def test_an_echoed_chat_begins_with_what_it_continues():
    body = {**BEGUN, "continue_final_message": True, "echo": True}
    assert answer(CHAT, body)["choices"][0]["message"]["content"] == "SureHello"
    assert assembled(ask(make_state(), CHAT, {**body, "stream": True}))[0]["content"] == "SureHello"
    assert answer(CHAT, {**chat(), "echo": True})["choices"][0]["message"]["content"] == "Hello"


def test_token_ids_of_prompt_and_answer():
    said = [*b"Hello", END]
    found = answer(CHAT, {**chat(), "return_token_ids": True})
    assert found["choices"][0]["token_ids"] == said
    assert bytes(one for one in found["prompt_token_ids"] if one < 256).decode().startswith("userhi")
    stream = chunks(ask(make_state(), CHAT, {**chat(), "return_token_ids": True, "stream": True}))
    assert stream[0]["prompt_token_ids"] == found["prompt_token_ids"]
    assert [one for chunk in stream for one in chunk["choices"][0].get("token_ids", [])] == said
    found = answer(COMPLETIONS, {"prompt": ["ab", "c"], "return_token_ids": True})
    assert [one["prompt_token_ids"] for one in found["choices"]] == [[97, 98], [99]]
    assert found["choices"][1]["token_ids"] == said
    stream = chunks(ask(make_state(), COMPLETIONS, {"prompt": "ab", "return_token_ids": True, "stream": True}))
    assert [one["choices"][0]["prompt_token_ids"] for one in stream] == [[97, 98]] + [None] * (len(stream) - 1)
    assert [one for chunk in stream for one in chunk["choices"][0]["token_ids"]] == said


def test_tokens_may_be_named_by_their_ids():
    found = answer(CHAT, {**chat(), "logprobs": True, "top_logprobs": 2, "return_tokens_as_token_ids": True})
    first = found["choices"][0]["logprobs"]["content"][0]
    assert first["token"] == "token_id:72" and first["top_logprobs"][1]["token"] == "token_id:1"
    body = {"prompt": "a", "logprobs": 1, "echo": True, "return_tokens_as_token_ids": True}
    told = answer(COMPLETIONS, body)["choices"][0]["logprobs"]
    assert told["tokens"][:2] == ["token_id:97", "token_id:72"] and "token_id:72" in told["top_logprobs"][1]


def test_all_log_probabilities_where_the_operator_allows_them():
    for path, body, field in (
        (CHAT, {**chat(), "logprobs": True, "top_logprobs": -1}, "top_logprobs"),
        (COMPLETIONS, {"prompt": "ab", "logprobs": -1}, "logprobs"),
        (COMPLETIONS, {"prompt": "ab", "prompt_logprobs": -1}, "prompt_logprobs"),
    ):
        refused = ask(make_state(), path, body)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, field)
        state = make_state(max_logprobs=-1)
        assert ask(state, path, body).status_code == 200
        sampling = state.engine.requests[0].sampling
        assert VOCAB in (sampling.logprobs, sampling.prompt_logprobs)


def test_log_probabilities_of_the_tokens_that_are_named():
    body = {**chat(), "logprobs": True, "logprob_token_ids": [5, 9], "return_tokens_as_token_ids": True}
    first = answer(CHAT, body)["choices"][0]["logprobs"]["content"][0]
    told = [(one["token"], one["logprob"]) for one in first["top_logprobs"]]
    assert told == [("token_id:72", -0.5), ("token_id:5", -5.0), ("token_id:9", -9.0)]
    body = {"prompt": "hi", "logprobs": 1, "logprob_token_ids": [5], "return_tokens_as_token_ids": True}
    told = answer(COMPLETIONS, body)["choices"][0]["logprobs"]["top_logprobs"][0]
    assert told == {"token_id:72": -0.5, "token_id:5": -5.0}
    for wrong in ({"logprobs": None}, {"use_beam_search": True}, {"logprob_token_ids": [VOCAB]}):
        refused = ask(make_state(), COMPLETIONS, {**body, **wrong})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "logprob_token_ids")


def test_no_tokens_but_the_echo():
    found = answer(COMPLETIONS, {"prompt": "ab", "max_tokens": 0, "echo": True, "logprobs": 1})["choices"][0]
    assert (found["text"], found["finish_reason"], found["logprobs"]["tokens"]) == ("ab", "length", ["a", "b"])


def test_a_prompt_is_cut_at_its_beginning():
    state = make_state()
    ask(state, COMPLETIONS, {"prompt": "abcdef", "truncate_prompt_tokens": 2})
    ask(state, COMPLETIONS, {"prompt": "x" * 5000, "truncate_prompt_tokens": -1, "max_tokens": 1})
    ask(state, "/v1/embeddings", {"input": "abcdef", "truncate_prompt_tokens": 3})
    assert [len(one.prompt_token_ids) for one in state.engine.requests] == [2, 4095, 3]
    assert state.engine.requests[0].prompt_token_ids == [*b"ef"]


def test_words_and_tokens_reach_the_engine_as_ids():
    state = make_state()
    ask(state, CHAT, {**chat(), "bad_words": ["ab"], "allowed_token_ids": [72, 101]})
    sampling = state.engine.requests[0].sampling
    assert sampling.bad_word_ids == [[*b"ab"], [*b" ab"]] and sampling.allowed_token_ids == [72, 101]
    refused = ask(make_state(), CHAT, {**chat(), "allowed_token_ids": [VOCAB]})
    assert refused.json()["error"]["param"] == "allowed_token_ids"


def hello_on(prompt: str, seed: int) -> str:
    """What is left of "Hello": a beam's past is a part of its prompt."""
    return "Hello"[len(prompt.rpartition("assistant")[2].removeprefix("hi")) :]


@pytest.mark.parametrize("stream", [False, True])
def test_the_beams_come_as_the_answers(stream: bool):
    body = {**chat(), "use_beam_search": True, "n": 2, "stream": stream, "temperature": 0}
    response = ask(make_state(hello_on), CHAT, body)
    if stream:
        assert assembled(response)[0]["content"] == "Hello"
        return
    found = response.json()
    assert found["choices"][0]["message"]["content"] == "Hello" and len(found["choices"]) == 2
    assert "use_beam_search" in found["warnings"][0]
    body = {"prompt": "hi", "use_beam_search": True, "logprobs": 2, "max_tokens": 3}
    best = ask(make_state(hello_on), COMPLETIONS, body).json()["choices"][0]
    assert best["text"] == "Hel" and best["finish_reason"] == "length" and len(best["logprobs"]["top_logprobs"]) == 3
    for wrong in ({"bad_words": ["a"]}, {"logit_bias": {"7": 1}}, {"presence_penalty": 1.0}, {"prompt_logprobs": 1}):
        refused = ask(make_state(), COMPLETIONS, {**body, **wrong})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, next(iter(wrong)))


def test_a_request_may_name_itself_and_be_sent_twice():
    state = make_state()
    for _ in range(2):
        assert ask(state, CHAT, {**chat(), "request_id": "mine"}).json()["id"] == "chatcmpl-mine"
    assert len({one.request_id for one in state.engine.requests}) == 2
    assert ask(state, CHAT, {**chat(), "request_id": "no spaces"}).status_code == 400


def test_templates_of_requests_where_the_operator_trusts_them():
    state = make_state(trust_request_chat_template=True)
    body = {**chat(), "chat_template": "Q: {{ messages[0].content }} {{ documents[0].text }} {{ mood }}"}
    more = {"documents": [{"text": "D"}], "chat_template_kwargs": {"mood": "M"}}
    assert ask(state, CHAT, {**body, **more}).status_code == 200
    assert bytes(state.engine.requests[0].prompt_token_ids) == b"Q: hi D M"
    body["chat_template"] = "Q: {{ messages[0].content }}"
    tokens = ask(state, "/tokenize", {**body, "return_token_strs": True}).json()
    assert "".join(tokens["token_strs"]) == "Q:Ġhi"  # as the vocabulary spells them
    for broken in ("{% if %}", "{{ messages.nothing.at.all }}"):
        assert ask(state, CHAT, {**body, "chat_template": broken}).status_code == 400


def test_documents_go_where_a_template_reads_them():
    state = make_state(template="{% for d in documents or [] %}{{ d.text }}{% endfor %}{{ messages[0].content }}")
    assert ask(state, CHAT, {**chat(), "documents": [{"text": "D"}]}).status_code == 200
    assert bytes(state.engine.requests[0].prompt_token_ids) == b"Dhi"


def test_usage_comes_with_every_chunk_where_it_is_wanted():
    body = {**chat(), "stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    assert all(chunk["usage"]["prompt_tokens"] > 0 for chunk in chunks(ask(make_state(), CHAT, body)))


def test_what_a_client_must_know_to_make_prompts():
    found = get(make_state(), "/tokenizer_info").json()
    assert found["vocab_size"] == VOCAB and found["eos_token"] == "<|im_end|>" and "im_start" in found["chat_template"]


def test_openais_paths_without_the_version():
    assert ask(make_state(), "/chat/completions", chat()).status_code == 200
    assert ask(make_state(), "/completions", {"prompt": "a"}).status_code == 200


def test_json_object_with_a_schema_is_that_schema():
    schema = {"type": "object", "properties": {"a": {"const": 7}}, "required": ["a"], "additionalProperties": False}
    body = {**chat(), "response_format": {"type": "json_object", "schema": schema}, "enable_thinking": False}
    assert answer(CHAT, body)["choices"][0]["message"]["content"].replace(" ", "") == '{"a":7}'


def test_usage_is_told_as_vllm_tells_it():
    """Continuous usage needs include_usage; an operator who forces it gets it in every chunk."""

    def usages(state: Any, **more: Any) -> list[Any]:
        body = {"prompt": "hi", "max_tokens": 3, "stream": True, **more}
        lines = [
            line[6:] for line in ask(state, "/v1/completions", body).text.splitlines() if line.startswith("data: {")
        ]
        return [json.loads(line).get("usage") for line in lines]

    assert not any(usages(make_state(), stream_options={"include_usage": False, "continuous_usage_stats": True}))
    forced = usages(make_state(enable_force_include_usage=True))
    assert len(forced) > 1 and all(forced)


def test_null_fields_of_a_completion_are_there():
    [choice] = ask(make_state(), "/v1/completions", {"prompt": "hi", "max_tokens": 2}).json()["choices"]
    assert [choice[name] for name in ("token_ids", "prompt_token_ids", "prompt_logprobs")] == [None] * 3


def test_a_limit_as_large_as_the_vocabulary_allows_all_of_it():
    body = {"prompt": "hi", "max_tokens": 1, "logprobs": -1}
    size = make_state().facts().model.vocab_size
    assert ask(make_state(max_logprobs=size), "/v1/completions", body).status_code == 200
    assert ask(make_state(max_logprobs=size - 1), "/v1/completions", body).status_code == 400


def test_a_key_of_logit_bias_that_is_no_id_is_named():
    refused = ask(make_state(), "/v1/completions", {"prompt": "hi", "logit_bias": {"5": 1, "five": 1, "six": 2}})
    assert refused.status_code == 400 and "five, six" in refused.json()["error"]["message"]


def test_a_request_s_times_are_told_where_the_operator_says_so():
    assert "metrics" not in ask(make_state(), CHAT, chat()).json()
    state = make_state(enable_per_request_metrics=True)
    streamed = {**chat(), "stream": True, "stream_options": {"include_usage": True}}
    last = json.loads(ask(state, CHAT, streamed).text.split("data: ")[-2])
    told = [
        ask(state, CHAT, chat()).json(),
        ask(state, "/v1/completions", {"prompt": "Hi"}).json(),
        ask(state, "/v1/responses", {"input": "Hi"}).json(),
        last,
    ]
    for times in (one["metrics"] for one in told):
        assert times["time_to_first_token_ms"] >= 0 and times["queue_time_ms"] >= 0 and times["tokens_per_second"] > 0
        assert times["generation_time_ms"] >= times["mean_itl_ms"] >= 0
    assert "metrics" not in ask(state, CHAT, {**chat(), "n": 2}).json()
    assert "mean_itl_ms" not in ask(state, CHAT, {**chat(), "max_tokens": 1}).json()["metrics"]


def test_an_operator_has_tokens_named_by_their_ids():
    body = {**chat(), "logprobs": True, "max_tokens": 1}
    for options, named in (({}, False), ({"return_tokens_as_token_ids": True}, True)):
        [token] = ask(make_state(**options), CHAT, body).json()["choices"][0]["logprobs"]["content"]
        assert token["token"].startswith("token_id:") == named


@pytest.mark.parametrize("name", ["include_usage", "continuous_usage_stats"])
@pytest.mark.parametrize(("path", "body"), [(CHAT, chat()), (COMPLETIONS, {"prompt": "hi"})])
def test_what_a_stream_should_tell_is_refused_without_a_stream(path: str, body: dict[str, Any], name: str):
    refused = ask(make_state(), path, {**body, "stream": False, "stream_options": {name: True}})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "stream_options"
    for nothing in (None, {}, {name: None}, {name: False}):
        answer(path, {**body, "stream_options": nothing})


@pytest.mark.parametrize("length", [600, 100_000], ids=["counted in tokens", "seen to be too long"])
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, "/v1/embeddings"])
def test_a_prompt_that_is_too_long_is_refused_in_the_words_that_clients_look_for(path: str, length: int):
    body = {CHAT: chat(messages=[{"role": "user", "content": "a" * length}])}.get(path, {"prompt": "a" * length})
    refused = ask(make_state(max_model_len=512), path, {"input": body["prompt"]} if path.endswith("ings") else body)
    assert refused.status_code == 400 and refused.json()["error"]["code"] == "context_length_exceeded"
    for words in ("this model's maximum context length", "Please reduce the length of the input prompt"):
        assert words in refused.json()["error"]["message"]

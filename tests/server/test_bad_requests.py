"""Whatever is wrong with a request is answered with one OpenAI-shaped 4xx that names the field and the limit."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from tests.server.live import LiveServer

MESSAGES = [{"role": "user", "content": "Hi"}]
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def chat(**fields: Any) -> str:
    return json.dumps({"model": "demo", "messages": MESSAGES, "max_tokens": 2, **fields})


def completion(**fields: Any) -> str:
    return json.dumps({"model": "demo", "prompt": "Hi", "max_tokens": 2, **fields})


CASES: dict[str, tuple[str, str | bytes, str | None, str]] = {
    # name: path, body, param, what the message must say
    "a field that changes the answer": (CHAT, chat(modalities=["text", "audio"]), "modalities", "text only"),
    "wrong type": (CHAT, chat(max_tokens="ten"), "max_tokens", "integer"),
    "boolean for a number": (CHAT, chat(temperature=True), "temperature", "number"),
    "number for a text": (COMPLETIONS, completion(stop=5), "stop", "stop"),
    "NaN": (CHAT, chat(temperature=float("nan")), "temperature", "finite"),
    "infinity": (CHAT, chat(top_p=float("inf")), "top_p", "finite"),
    "1e999": (CHAT, chat(temperature=0).replace('"temperature": 0', '"temperature": 1e999'), "temperature", "finite"),
    "NaN in logit_bias": (CHAT, chat(logit_bias={"5": float("nan")}), "logit_bias.5", "finite"),
    "a number of 5000 digits": (CHAT, chat(seed=0).replace('"seed": 0', '"seed": ' + "9" * 5000), None, ""),
    "no messages": (CHAT, json.dumps({"model": "demo"}), "messages", "required"),
    "empty messages": (CHAT, chat(messages=[]), "messages", "at least 1"),
    "message without role": (CHAT, chat(messages=[{"content": "x"}]), "messages.0.role", "required"),
    "message that is a text": (CHAT, chat(messages=["x"]), "messages.0", "object"),
    "image": (CHAT, chat(messages=[{"role": "user", "content": [{"type": "image_url"}]}]), "messages", "text only"),
    "prompt longer than the model": (COMPLETIONS, completion(prompt=[5] * 9000), "prompt", "8192"),
    "prompt as long as the model": (COMPLETIONS, completion(prompt=[5] * 8192), "prompt", "8192"),
    "messages longer than the model": (CHAT, chat(messages=[{"role": "user", "content": "one two " * 5000}]), "messages", "8192"),
    "an answer longer than the model": (COMPLETIONS, completion(prompt=[5] * 8000, max_tokens=8193), "max_tokens", "192"),
    "more characters than the model can read": (COMPLETIONS, completion(prompt="a" * 1_000_000), "prompt", "262144"),
    "ten million characters": (COMPLETIONS, completion(prompt="a" * 10_000_000), None, "262144"),
    "a million spaces": (COMPLETIONS, completion(prompt=" " * 1_000_000), "prompt", "262144"),
    "empty prompt": (COMPLETIONS, completion(prompt=""), "prompt", "empty"),
    "empty list of prompts": (COMPLETIONS, completion(prompt=[]), "prompt", "empty"),
    "empty prompt among others": (COMPLETIONS, completion(prompt=["Hi", ""]), "prompt", "empty"),
    "token outside the vocabulary": (COMPLETIONS, completion(prompt=[49152]), "prompt", "49152"),
    "negative token": (COMPLETIONS, completion(prompt=[-1]), "prompt", "0"),
    "an escape without its end": (COMPLETIONS, b'{"model": "demo", "prompt": "\\ud80"}', None, "Invalid JSON"),
    "temperature too low": (CHAT, chat(temperature=-0.01), "temperature", "0"),
    "temperature too high": (CHAT, chat(temperature=100.5), "temperature", "100"),
    "top_p too high": (CHAT, chat(top_p=1.01), "top_p", "1"),
    "top_k too low": (CHAT, chat(top_k=-2), "top_k", "-1"),
    "min_p too high": (CHAT, chat(min_p=1.5), "min_p", "1"),
    "presence_penalty too high": (CHAT, chat(presence_penalty=2.1), "presence_penalty", "2"),
    "repetition_penalty zero": (CHAT, chat(repetition_penalty=0), "repetition_penalty", "0"),
    "n zero": (CHAT, chat(n=0), "n", "1"),
    "n too high": (CHAT, chat(n=129), "n", "128"),
    "max_tokens below zero": (CHAT, chat(max_tokens=-1), "max_tokens", "0"),
    "min_tokens above max_tokens": (CHAT, chat(min_tokens=3), "min_tokens", "max_tokens"),
    "top_logprobs too high": (CHAT, chat(logprobs=True, top_logprobs=21), "top_logprobs", "20"),
    "top_logprobs without logprobs": (CHAT, chat(top_logprobs=2), "top_logprobs", "logprobs"),
    "logprobs too high": (COMPLETIONS, completion(logprobs=21), "logprobs", "20"),
    "seed too large": (CHAT, chat(seed=2**64), "seed", ""),
    "too many stop strings": (CHAT, chat(stop=["x"] * 17), "stop", "16"),
    "empty stop string": (CHAT, chat(stop=[""]), "stop", "1"),
    "stop token outside the vocabulary": (CHAT, chat(stop_token_ids=[49152]), "stop_token_ids", "49152"),
    "logit_bias outside the vocabulary": (CHAT, chat(logit_bias={"49152": 1}), "logit_bias", "49152"),
    "logit_bias too strong": (CHAT, chat(logit_bias={"5": 101}), "logit_bias", "100"),
    "logit_bias for a word": (CHAT, chat(logit_bias={"yes": 1}), "logit_bias", "token ids"),
    "logit_bias of a million": (CHAT, chat(logit_bias={str(i): 1 for i in range(1_000_000)}), "logit_bias", "1024"),
    "logit_bias of many": (CHAT, chat(logit_bias={str(i): 1 for i in range(40_000)}), "logit_bias", "1024"),
    "truncated JSON": (CHAT, chat()[:-5], None, "JSON"),
    "empty body": (CHAT, "", None, "JSON"),
    "a list": (CHAT, "[]", None, "object"),
    "invalid UTF-8": (CHAT, b'{"model": "\xff"}', None, ""),
    "deep nesting": (CHAT, "[" * 150_000, None, ""),
    "body too large": (CHAT, b" " * (33 * 2**20), None, "33554432"),
    "a template of the caller's": (CHAT, chat(chat_template="{{ 1 }}"), "chat_template", "chat_template"),
    "tokenize nothing": ("/tokenize", "{}", "prompt", "messages"),
    "detokenize a negative id": ("/detokenize", '{"tokens": [-1]}', "tokens.0", "0"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_one_clear_error_and_the_next_request_works(server: LiveServer, name: str):
    path, body, param, says = CASES[name]
    start_s = time.monotonic()
    response = server.http.post(path, content=body, headers={"content-type": "application/json"})
    took_s = time.monotonic() - start_s
    assert 400 <= response.status_code < 500, response.text
    assert set(response.json()) == {"error"}
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param or param is None
    assert says in error["message"]
    assert len(error["message"].splitlines()) == 1 and len(error["message"]) < 400
    assert took_s < 5, "refusing must be cheap"
    good = server.http.post(CHAT, content=chat(temperature=0, max_tokens=1))
    assert good.status_code == 200
    assert good.json()["choices"][0]["finish_reason"] == "length"


def test_errors_of_a_stream_come_before_it_begins(server: LiveServer):
    response = server.http.post(CHAT, content=chat(stream=True, n=1000))
    assert response.status_code == 400
    assert response.headers["content-type"] == "application/json"


def test_unknown_routes_and_methods(server: LiveServer):
    missing = server.http.get("/v1/nothing")
    assert (missing.status_code, set(missing.json()["error"])) == (404, {"message", "type", "param", "code"})
    assert server.http.get(CHAT).status_code == 405


def test_what_has_no_effect_is_said(server: LiveServer):
    answer = server.http.post(CHAT, content=chat(user="somebody", store=False)).json()
    assert answer["warnings"] == ["store has no effect on this server", "user has no effect on this server"]

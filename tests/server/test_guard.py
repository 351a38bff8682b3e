"""Who may ask, and for how much: before anything reaches the engine."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import time

import httpx
import pytest

from fastqwen import logs
from fastqwen.errors import BadConfig
from fastqwen.server.app import create_app
from fastqwen.server.config import ServerConfig, WebConfig
from fastqwen.server.http import guard
from fastqwen.server.http.exposure import check_exposure, read_keys
from fastqwen.server.http.guard import OPEN_PATHS
from fastqwen.server.http.pages import PAGES
from tests.server.harness import ask, chat, client_of, get, make_state

KEY = "a-long-secret-key"
CHAT = "/v1/chat/completions"
COMPLETION = "/v1/completions"


def routes() -> list[tuple[str, str]]:
    app = create_app(make_state())._app
    return sorted((method, route.path) for route in app.routes for method in getattr(route, "methods", None) or ["GET"])


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": f"Bearer {KEY[:-1]}"},
        {"authorization": f"Basic {KEY}"},
        {"x-api-key": ""},
    ],
)
def test_every_route_but_the_open_ones_needs_the_key(headers: dict):
    open_pages = {*PAGES, "/chat/0a1b"}

    async def walk() -> None:
        state = make_state(api_keys=(KEY,))
        async with client_of(state) as client:
            for method, path in routes():
                path = path.replace("{name:path}", "mock").replace("{path:path}", "x")
                path = path.replace("{conversation}", "0a1b")
                for variant in (
                    path,
                    f"/{path}",
                    f"{path}/",
                    f"{path}?x=1",
                    path.upper(),
                    path.replace("/v1/", "/v1%2f"),
                ):
                    for verb in {method, "HEAD", "OPTIONS", "POST"}:
                        found = await client.request(verb, f"http://localhost{variant}", headers=headers)
                        exact = variant.split("?")[0].rstrip("/") or "/"
                        is_open = verb in ("GET", "HEAD") and (
                            exact in OPEN_PATHS or exact in open_pages or exact.startswith("/static/")
                        )
                        assert (found.status_code != 401) == is_open, (verb, variant, found.status_code)

    asyncio.run(walk())


def test_a_root_path_opens_nothing():
    """A proxy's prefix must not make a closed path look like an open one."""

    async def run() -> None:
        app = create_app(make_state(api_keys=(KEY,)))
        for root in ("/health", "/static", "/v1", "/health/ready"):
            transport = httpx.ASGITransport(app, root_path=root)
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
                for path in ("/health", "/v1/models", "/health/v1/models", "/static/v1/models", "/static/../v1/models"):
                    assert (await client.get(path)).status_code == 401, (root, path)

    asyncio.run(run())


def test_no_request_makes_the_server_open_a_connection(monkeypatch: pytest.MonkeyPatch):
    connected: list[object] = []
    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, lambda *args: connected.append(args))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **more: connected.append(args) or [])
    for url in (
        "http://169.254.169.254/latest/meta-data",
        "file:///etc/passwd",
        "https://example.org/x",
        "//example.org/x",
    ):
        image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]
        bodies = [
            (CHAT, {"messages": image}),
            (CHAT, {"messages": [{"role": "user", "content": [{"type": "file", "file": {"file_url": url}}]}]}),
            (CHAT, chat("x", guided_json={"$ref": url})),
            (CHAT, chat("x", model=url)),
            (CHAT, chat("x", chat_template=url)),
            (
                COMPLETION,
                {"prompt": url, "response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": url}}}},
            ),
            ("/v1/messages", {"model": "m", "max_tokens": 1, "messages": image}),
            ("/v1/responses", {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": url}]}]}),
        ]
        for path, body in bodies:
            assert ask(make_state(), path, body).status_code in (200, 400)
    assert connected == []


def test_the_right_key_lets_in_and_there_may_be_several():
    state = make_state(api_keys=("other-key", KEY))
    assert get(state, "/v1/models", authorization=f"Bearer {KEY}").status_code == 200
    assert get(state, "/v1/models", **{"x-api-key": KEY}).status_code == 200


def test_keys_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch):
    compared = []
    monkeypatch.setattr(guard.hmac, "compare_digest", lambda a, b: compared.append((len(a), len(b))) or a == b)
    get(make_state(api_keys=(KEY, "another-key")), "/v1/models", authorization="Bearer x")
    assert compared == [(32, 32), (32, 32)]


def test_keys_come_from_flag_file_or_environment(tmp_path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "keys"
    file.write_text("key-in-a-file\n\n")
    monkeypatch.setenv("FASTQWEN_API_KEY", "key-number-one, key-number-two")
    assert read_keys([], None, ServerConfig) == ("key-number-one", "key-number-two")
    assert read_keys(["key-as-a-flag"], file, ServerConfig) == ("key-as-a-flag", "key-in-a-file")
    with pytest.raises(BadConfig, match="--api-key is empty"):
        read_keys([""], None, ServerConfig)
    monkeypatch.setenv("VLLM_API_KEY", "a-key,of-vllm")
    assert read_keys([], None, ServerConfig) == ("key-number-one", "key-number-two"), "our own variable goes first"
    monkeypatch.delenv("FASTQWEN_API_KEY")
    assert read_keys([], None, ServerConfig) == ("a-key,of-vllm",), "vLLM knows one key"
    assert read_keys([], None, WebConfig) == (), "no key of the server behind lets visitors in"
    with pytest.raises(BadConfig, match="no-such"):
        read_keys([], tmp_path / "no-such", ServerConfig)


def test_listening_publicly_needs_a_key_or_insecure():
    with pytest.raises(BadConfig, match="--insecure"):
        check_exposure(ServerConfig(host="0.0.0.0"))
    check_exposure(ServerConfig(host="0.0.0.0", insecure=True))
    check_exposure(ServerConfig(host="0.0.0.0", api_keys=(KEY,)))
    check_exposure(ServerConfig(host="127.0.0.1"))
    assert KEY not in repr(ServerConfig(api_keys=(KEY,)))


def test_a_short_key_is_enough_on_this_machine_alone(caplog: pytest.LogCaptureFixture):
    check_exposure(ServerConfig(api_keys=("abc",)))
    assert "less than 8 characters" in caplog.text and "abc" not in caplog.text
    with pytest.raises(BadConfig, match="less than 8 characters"):
        check_exposure(ServerConfig(host="0.0.0.0", api_keys=("abc",)))


def test_a_rebound_host_name_is_turned_away():
    assert get(make_state(), "/v1/models", host="evil.example:8000").status_code == 403
    assert get(make_state(), "/health", host="evil.example").status_code == 403
    assert get(make_state(), "/v1/models", host="localhost:8000").status_code == 200
    assert get(make_state(), "/v1/models", host="[::1]:8000").status_code == 200
    assert get(make_state(allowed_hosts=("box.lan",)), "/v1/models", host="box.lan").status_code == 200


def test_other_sites_may_not_read_answers_unless_allowed():
    response = get(make_state(), "/v1/models", origin="https://evil.example")
    assert "access-control-allow-origin" not in response.headers
    allowed = make_state(allowed_origins=("https://good.example",))
    assert get(allowed, "/v1/models", origin="https://good.example").headers["access-control-allow-origin"]
    assert "access-control-allow-origin" not in get(allowed, "/v1/models", origin="https://evil.example").headers


BAD_BODIES = [
    b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe{}", b'{"prompt": "\\ud80"}', b'{"prompt": NaN}',
    b'{"prompt": "a", "temperature": NaN}', b'{"prompt": "a", "temperature": Infinity}', b'{"prompt": "a", "temperature": 1e999}',
    b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", b'{"prompt": "a", "metadata": {"x": NaN}}',
    b'{"prompt": "a", "metadata": {"x": -Infinity}}', b'{"prompt": "a", "metadata": {"x": "\\udc0"}}',
    b'{"prompt": ' + b"[" * 150_000, b'{"prompt": ' + b"[" * 1000 + b"]" * 1000 + b"}",
    b'{"prompt": "a", "metadata": ' + b'{"a":' * 1000 + b"1" + b"}" * 1000 + b"}",
    b'{"prompt": [1, -1]}', b'{"prompt": [1, 99999999]}', b'{"prompt": [1.5]}', b'{"prompt": []}', b'{"prompt": ""}',
    b'{"prompt": [[]]}', b'{"prompt": {}}', b'{"prompt": "a", "n": 0}', b'{"prompt": "a", "n": "2"}', b'{"prompt": "a", "n": true}',
    b'{"prompt": "a", "logit_bias": {"x": 1}}', b'{"prompt": "a", "logit_bias": {"99999999": 1}}',
    b'{"prompt": "a", "logit_bias": {"-1": 1}}', b'{"prompt": "a", "logit_bias": {"1": 101}}',
    b'{"prompt": "a", "stop": [""]}', b'{"prompt": "a", "stop": 3}', b'{"prompt": "a", "stop_token_ids": [99999]}',
    b'{"prompt": "a", "max_tokens": -1}', b'{"prompt": "a", "max_tokens": 99999999999999999999}',
    b'{"prompt": "a", "stream_options": 5}', b'{"prompt": "a", "cache_salt": "' + b"x" * 257 + b'"}',
    b'{"prompt": "a", "best_of": 1, "n": 2}', b'{"prompt": "a", "best_of": 2, "stream": true}',
]  # fmt: skip


POSTS = [
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/tokenize",
    "/detokenize",
]
ANYWHERE = [
    b"", b"{", b"[]", b"null", b'"x"', b"1", b"\xff\xfe{}", b"{} {}", b"{'a': 1}", b'{"a": 1,}', b"\x00", b'{"a": "\x00"}',
    b"[" * 150_000,
    b'{"model": "\\ud800"}', b'{"model": "\xc3"}', b'{"model": 1}', b'{"model": NaN}', b'{"model": 1e999}',
    b'{"model": ' + b"9" * 5000 + b"}",
    b'{"model": ' + b'{"a":' * 5000 + b"1" + b"}" * 5000 + b"}", b'{"no_such_field": 1}',
    b'{"model": "a", "model": 5}', b"\xef\xbb\xbf5",
    b'{"messages": "x", "prompt": {}, "tokens": "x", "input": 5}',
    b'{"messages": [[]], "prompt": [[[1]]], "tokens": [[1]], "input": [[1]]}',
]  # fmt: skip


def test_every_route_answers_any_body_with_one_clear_error():
    async def run() -> int:
        count = 0
        async with client_of(make_state()) as client:
            for path in POSTS:
                for body in ANYWHERE:
                    response = await client.post(path, content=body)
                    assert response.status_code == 400, (path, body[:80], response.text)
                    error = response.json()["error"]
                    assert set(error) == {"message", "type", "param", "code"}
                    assert len(error["message"].splitlines()) == 1 and len(error["message"]) < 1000
                    count += 1
            assert (await client.post(COMPLETION, json={"prompt": "a"})).status_code == 200
        return count

    assert asyncio.run(run()) + 6 * len(BAD_BODIES) >= 300


def test_malformed_bodies_are_answered_and_the_next_request_works():
    async def run() -> None:
        state = make_state()
        async with client_of(state) as client:
            for body in BAD_BODIES:
                for variant in (body, body[: len(body) // 2], body + b"}", body.replace(b'"', b"'"), b" " * 9 + body):
                    start_s = time.process_time()
                    response = await client.post(COMPLETION, content=variant)
                    assert time.process_time() - start_s < 1.0, variant[:80]
                    if response.status_code != 200:
                        assert response.status_code == 400, (variant[:80], response.text)
                        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
                response = await client.post(COMPLETION, content=body)
                assert response.status_code == 400, (body[:80], response.text)
            good = await client.post(COMPLETION, json={"prompt": "a"})
            assert good.status_code == 200
            assert state.num_active == 0

    asyncio.run(run())


BOUNDS = [
    ("n", 128, 129), ("logprobs", 20, 21), ("best_of", 128, 129), ("max_tokens", 4096, 4097), ("seed", 2**63 - 1, 2**64),
    ("stop", ["x"] * 16, ["x"] * 17), ("stop", ["x" * 1024], ["x" * 1025]), ("temperature", 100.0, 100.1),
    ("stop_token_ids", [1] * 64, [1] * 65), ("prompt_logprobs", 20, 21), ("min_tokens", 1, -1), ("top_p", 1.0, 1.1),
    ("presence_penalty", -2.0, -2.1), ("frequency_penalty", 2.0, 2.1), ("repetition_penalty", 100.0, 0.0),
    ("logit_bias", {str(i % 256): 1.0 for i in range(256)}, {str(i): 1.0 for i in range(10**5)}), ("min_p", 0.0, -0.1),
    ("prompt", [1] * 4095, [1] * 4096), ("priority", 2**31 - 1, 2**31), ("top_k", -1, -2), ("cache_salt", "x" * 256, "x" * 257),
]  # fmt: skip


@pytest.mark.parametrize(("field", "good", "bad"), BOUNDS)
def test_bounds_are_exact(field: str, good, bad):
    base = {"prompt": [1], "max_tokens": 1}
    if field == "max_tokens":
        base["stop"] = ["H"]
    taken_s: dict[bool, list[float]] = {True: [], False: []}
    for is_good in (True, False) * 3:  # the best of three: a collection of earlier tests' garbage may fall into one
        start_s = time.process_time()
        response = ask(make_state(), COMPLETION, {**base, field: good if is_good else bad})
        taken_s[is_good].append(time.process_time() - start_s)
        assert not is_good or response.status_code == 200
    least_s = 1.0 if field == "logit_bias" else 0.1  # a thousand biases are read before one is too many
    assert min(taken_s[False]) < max(least_s, 2 * min(taken_s[True])), "to refuse costs as much as to answer"
    assert response.status_code == 400
    assert response.json()["error"]["param"].startswith(field) or field == "prompt"


SCHEMA = {"type": "json_schema", "json_schema": {"schema": {"type": "object", "properties": {"abc": {}}}}}
STRICTER = [
    ("max_n", 2, {"n": 2}, {"n": 3}, "n"),
    ("max_n", 2, {"best_of": 2}, {"best_of": 3}, "n"),
    ("max_logprobs", 1, {"logprobs": 1}, {"logprobs": 2}, "logprobs"),
    ("max_logprobs", 1, {"prompt_logprobs": 1}, {"prompt_logprobs": 2}, "prompt_logprobs"),
    ("max_logit_bias", 1, {"logit_bias": {"1": 1.0}}, {"logit_bias": {"1": 1.0, "2": 1.0}}, "logit_bias"),
    ("max_stop_strings", 1, {"stop": ["a"]}, {"stop": ["a", "b"]}, "stop"),
    ("max_stop_chars", 3, {"stop": "abc"}, {"stop": ["a", "abcd"]}, "stop"),
    ("max_grammar_chars", 100, {"guided_regex": "a+"}, {"response_format": SCHEMA}, "structured_outputs"),
]


@pytest.mark.parametrize(("limit", "value", "good", "bad", "param"), STRICTER)
def test_a_server_may_be_stricter_and_names_the_flag(limit: str, value: int, good: dict, bad: dict, param: str):
    state = make_state(**{limit: value})
    base = {"prompt": [1], "max_tokens": 1}
    assert ask(state, COMPLETION, {**base, **good}).status_code == 200
    num_requests = len(state.engine.requests)
    error = ask(state, COMPLETION, {**base, **bad}).json()["error"]
    assert error["param"] == param
    assert f"{value} (--{limit.replace('_', '-')})" in error["message"]
    assert len(state.engine.requests) == num_requests, "it never reached the engine"


def test_a_body_that_is_too_large_is_refused_unread():
    response = ask(make_state(max_body_bytes=1000), COMPLETION, {"prompt": "a" * 2000})
    assert response.status_code == 413
    assert "1000" in response.json()["error"]["message"]


def test_a_prompt_of_too_many_characters_never_reaches_the_tokenizer():
    state = make_state()
    state.workers.run = None
    for text in ("a" * 200_000, " " * 200_000, "\u3000" * 200_000):
        assert ask(state, COMPLETION, {"prompt": text}).json()["error"]["code"] == "context_length_exceeded"
        assert ask(state, CHAT, chat(text)).json()["error"]["code"] == "context_length_exceeded"


def test_more_requests_than_allowed_get_429_and_the_count_returns_to_zero():
    async def run() -> None:
        state = make_state(lambda prompt, seed: "x" * 40, max_concurrent_requests=3)
        state.engine.step_delay_s = 0.002
        async with client_of(state) as client:
            sent = [
                client.post(COMPLETION, json={"prompt": "a", "max_tokens": 40, "stream": i % 2 == 0}) for i in range(8)
            ]
            found = await asyncio.gather(*sent)
            codes = sorted(response.status_code for response in found)
            assert codes == [200] * 3 + [429] * 5
            assert all(response.headers["retry-after"] for response in found if response.status_code == 429)
            assert state.num_active == 0

    asyncio.run(run())


def test_draining_refuses_new_requests_and_lets_running_ones_finish():
    async def run() -> None:
        state = make_state(lambda prompt, seed: "x" * 40)
        state.engine.step_delay_s = 0.005
        async with client_of(state) as client:
            running = asyncio.create_task(client.post(COMPLETION, json={"prompt": "a", "max_tokens": 40}))
            await asyncio.sleep(0.05)
            state.draining = True
            assert (await client.post(COMPLETION, json={"prompt": "a"})).status_code == 503
            assert (await client.get("/health/ready")).status_code == 503
            assert (await running).json()["choices"][0]["text"] == "x" * 40

    asyncio.run(run())


def test_when_the_engine_dies_a_stream_ends_with_an_error_and_not_with_done():
    async def run() -> httpx.Response:
        state = make_state(lambda prompt, seed: "x" * 4000)
        state.engine.step_delay_s = 0.002
        async with client_of(state) as client:
            running = asyncio.create_task(
                client.post(COMPLETION, json={"prompt": "a", "max_tokens": 4000, "stream": True})
            )
            await asyncio.sleep(0.1)
            state.engine.die()
            assert (await client.post(COMPLETION, json={"prompt": "a"})).status_code == 503
            return await running

    response = asyncio.run(run())
    last = response.text.rstrip().split("\n\n")[-1]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "engine_error"
    assert "[DONE]" not in response.text


def test_log_lines_hold_no_control_characters():
    record = logging.makeLogRecord({"msg": "a\x1b[31m\x00\r\u202e b", "levelname": "INFO", "levelno": 20})
    line = logs.TextFormatter().format(record)
    assert not any(char in line for char in "\x1b\x00\r\u202e")

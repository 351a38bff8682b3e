"""HTTP as its RFCs have it, and failures in the words of the API that was asked."""

from __future__ import annotations

import asyncio
import gzip
import json
import zlib
from typing import Any

import httpx
import pytest

from fastqwen.server.dialects.messages import Messages
from fastqwen.server.dialects.responses import Responses
from fastqwen.server.http.errors import error_body
from fastqwen.server.http.guard import routed
from fastqwen.server.http.pages import STATIC
from tests.server.harness import ask, chat, client_of, get, make_state

CHAT, MESSAGES = "/v1/chat/completions", "/v1/messages"
KEYED = {"api_keys": ("abcdefgh12",), "allowed_origins": ("https://page.example",)}


def send(method: str, path: str, state: Any = None, **headers: str) -> httpx.Response:
    async def run() -> httpx.Response:
        async with client_of(state or make_state()) as client:
            return await client.request(method, path, headers={k.replace("_", "-"): v for k, v in headers.items()})

    return asyncio.run(run())


def test_a_preflight_needs_no_key_and_gets_the_headers_it_asks_for():
    asked = {"Access_Control_Request_Method": "POST", "Access_Control_Request_Headers": "authorization,x-stainless-os"}
    found = send("OPTIONS", CHAT, make_state(**KEYED), Origin="https://page.example", **asked)
    assert (found.status_code, found.headers["access-control-allow-headers"]) == (204, "authorization,x-stainless-os")
    other = send("OPTIONS", CHAT, make_state(**KEYED), Origin="https://other.example", **asked)
    assert "access-control-allow-origin" not in other.headers and other.status_code != 204
    plain = send("OPTIONS", CHAT, make_state(**KEYED), Origin="https://page.example")
    assert plain.status_code == 401
    odd = send(
        "OPTIONS",
        CHAT,
        make_state(**KEYED),
        Origin="https://page.example",
        **{**asked, "Access_Control_Request_Headers": "a(b)"},
    )
    assert "a(b)" not in odd.headers["access-control-allow-headers"]


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/health/ready", "/metrics", "/", "/openapi.json"])
def test_head_is_get_without_a_body(path: str):
    found, whole = send("HEAD", path), get(make_state(), path)
    assert (found.status_code, found.content, found.headers["content-type"] if whole.content else "") == (
        200, b"", whole.headers["content-type"] if whole.content else "",
    )  # fmt: skip
    assert (
        send("HEAD", path, make_state(api_keys=("abcdefgh12",))).status_code
        == get(make_state(api_keys=("abcdefgh12",)), path).status_code
    )
    assert send("HEAD", CHAT).status_code == 405


@pytest.mark.parametrize(
    ("asked", "path"),
    [
        ("/v1/models/", "/v1/models"), ("/chat/completions", CHAT), ("/v1/v1/messages", MESSAGES), ("/", "/"),
        ("/models", "/v1/models"),
        ("/v1/models/a/b", "/v1/models/a/b"), ("//health", "//health"), ("//admin", "//admin"), ("//v1//messages/", MESSAGES),
        ("/messages/count_tokens", "/v1/messages/count_tokens"),
    ],
)  # fmt: skip
def test_paths_as_clients_put_them_together(asked: str, path: str):
    assert routed(asked) == path
    assert get(make_state(), "/v1/models/").json()["object"] == "list"


@pytest.mark.parametrize(
    ("coding", "encode"),
    [("gzip", gzip.compress), ("x-gzip", gzip.compress), ("deflate", zlib.compress), ("identity", bytes),
     ("deflate", lambda data: zlib.compress(data, wbits=-15)), ("deflate, gzip", lambda data: gzip.compress(zlib.compress(data))),
     ("gzip", lambda data: gzip.compress(data[:9]) + gzip.compress(data[9:]))],
)  # fmt: skip
def test_a_body_may_be_compressed(coding: str, encode: Any):
    body = encode(json.dumps(chat()).encode())
    assert ask(make_state(), CHAT, body, **{"Content-Encoding": coding}).status_code == 200


# Named, since a gzip header holds the time: two workers of one run would otherwise collect different tests.
@pytest.mark.parametrize(
    ("coding", "body", "status"),
    [
        pytest.param("br", b"x", 415, id="a coding we lack"),
        pytest.param("gzip, br", b"x", 415, id="one of two that we lack"),
        pytest.param(", ".join(["gzip"] * 4), b"x", 415, id="four on top of each other"),
        pytest.param("gzip", b"{}", 400, id="not compressed"),
        pytest.param("gzip, gzip", b"x", 400, id="not compressed twice"),
        pytest.param("gzip", gzip.compress(b"") * 100, 400, id="a hundred empty members"),
        pytest.param("gzip", gzip.compress(b"{}" * 40)[:-9], 400, id="cut"),
        pytest.param("gzip", gzip.compress(b" " * 5000), 413, id="over the limit"),
        pytest.param(
            "gzip, gzip", gzip.compress(gzip.compress(b" " * 5000)), 413, id="over the limit, twice compressed"
        ),
    ],
)
def test_compressed_bodies_are_bounded_and_whole(coding: str, body: bytes, status: int):
    assert ask(make_state(max_body_bytes=4096), CHAT, body, **{"Content-Encoding": coding}).status_code == status


def test_what_a_resource_can_is_told_with_the_refusal():
    assert send("DELETE", "/v1/models").headers["allow"] == "GET, HEAD"
    refused = ask(make_state(), CHAT, b"x", **{"Content-Encoding": "br"})
    assert "gzip" in refused.headers["accept-encoding"]


def test_exactly_one_host():
    async def run() -> list[int]:
        async with client_of(make_state()) as client:
            two = [("Host", "localhost"), ("Host", "127.0.0.1")]
            return [(await client.get("/health", headers=two)).status_code, (await client.get("/health")).status_code]

    assert asyncio.run(run()) == [400, 200]


@pytest.mark.parametrize(
    ("body", "more", "kind"),
    [
        ({"messages": []}, {}, "invalid_request_error"),
        ({"messages": []}, {"api_keys": ("abcdefgh12",)}, "authentication_error"),
        ({"messages": [{"role": "user", "content": "x"}], "max_tokens": 1, "model": "other"},
         {"strict_model_name": True}, "not_found_error"),
        ("x" * 5000, {"max_body_bytes": 1000}, "request_too_large"),
    ],
)  # fmt: skip
def test_errors_of_messages_have_anthropics_names(body: Any, more: dict[str, Any], kind: str):
    found = ask(make_state(**more), MESSAGES, body).json()
    assert (found["type"], found["error"]["type"]) == ("error", kind)


def test_unknown_paths_below_messages_too():
    assert get(make_state(), "/v1/messages/batches").json()["error"]["type"] == "not_found_error"
    assert get(make_state(), MESSAGES).json()["error"]["type"] == "invalid_request_error"


def test_streams_fail_in_the_words_of_their_api():
    body = error_body("it broke", "server_error", None, "internal_error")
    said = Messages.failure(object.__new__(Messages), 503, body).decode()
    assert (
        said.startswith("event: error\n") and json.loads(said.split("data: ")[1])["error"]["type"] == "overloaded_error"
    )
    work = object.__new__(Responses)
    work._num_events = 7
    event = json.loads(work.failure(500, body).decode().split("data: ")[1])
    assert event == {
        "type": "error", "sequence_number": 7, "code": "internal_error", "message": "it broke", "param": None,
    }  # fmt: skip


def test_streamed_completions_count_their_offsets_on():
    body = {"prompt": "hi", "logprobs": 1, "max_tokens": 60, "echo": True}
    whole = ask(make_state(), "/v1/completions", body).json()["choices"][0]["logprobs"]
    text = ask(make_state(), "/v1/completions", {**body, "stream": True}).text
    chunks = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    parts = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    for name in ("tokens", "text_offset", "token_logprobs"):
        assert [one for part in parts for one in part[name]] == whole[name]


def test_a_streamed_chat_has_the_prompts_log_probabilities():
    text = ask(make_state(), CHAT, chat(prompt_logprobs=1, stream=True)).text
    assert text.count('"prompt_logprobs"') == 1


def test_files_of_the_pages_are_sent_whole_once_and_then_only_known():
    state = make_state()
    whole = get(state, "/static/vendor/katex/katex.js")
    assert whole.content == (STATIC / "vendor/katex/katex.js").read_bytes() and whole.status_code == 200
    assert whole.headers["content-type"].startswith("text/javascript") and "sandbox" not in str(whole.headers)
    for asked in (whole.headers["etag"], f'"other", W/{whole.headers["etag"]}'):
        known = send("GET", "/static/vendor/katex/katex.js", state, **{"If_None_Match": asked})
        assert (known.status_code, known.content, known.headers["etag"]) == (304, b"", whole.headers["etag"])
    assert send("GET", "/static/vendor/katex/katex.js", state, **{"If_None_Match": '"other"'}).status_code == 200
    assert b'"../static/' in get(state, "/chat/abc").content
    for path in ("/static/", "/static/none", "/static/../app.py", "/static/%2e%2e/app.py", "/static//js/app.js"):
        assert get(state, path).status_code == 404, path

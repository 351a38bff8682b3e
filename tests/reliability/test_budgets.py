"""What one client may cost the others: bytes, time, values of a body, a page that asks without leave."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import httpx
import psutil
import pytest

from tests.reliability.server import Server, serving
from tests.server.live import eventually

AT_MOST_S = 2.0  # of processor time: how long others wait depends on what else the machine does
BODY = b'{"messages":[{"role":"user","content":"hi"}],"max_tokens":3}'
HOST = b"Host: 127.0.0.1\r\n"
POST = b"POST /v1/chat/completions HTTP/1.1\r\n" + HOST
GET = b"GET /v1/models HTTP/1.1\r\n" + HOST


@contextmanager
def connected(server: Server) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        yield connection


def answers(server: Server, data: bytes, count: int = 1) -> bytes:
    with connected(server) as connection:
        connection.sendall(data)
        found = b""
        while found.count(b"HTTP/1.1 ") < count or not found.endswith((b"}", b"\n")):
            part = connection.recv(65536)
            if not part:
                break
            found += part
        return found


@contextmanager
def cheap(server: Server) -> Iterator[None]:
    """Little of the API process's one thread is spent on it, so that /health never waits long, and little memory."""
    process = psutil.Process(server.process.pid)
    begin_s, before = sum(process.cpu_times()[:2]), process.memory_info().rss
    yield
    assert sum(process.cpu_times()[:2]) - begin_s < AT_MOST_S
    assert process.memory_info().rss - before < 60 * 2**20
    assert httpx.get(f"{server.url}/health", timeout=30).status_code == 200


def repeated(item: bytes, size: int) -> bytes:
    return b",".join([item] * (size // (len(item) + 1)))


COSTLY = {
    "messages": ("/v1/chat/completions", b'{"messages":[%b]}', b'{"role":"user","content":"a"}'),
    "parts": ("/v1/chat/completions", b'{"messages":[{"role":"user","content":[%b]}]}', b"{}"),
    "extras": ("/v1/chat/completions", b'{"messages":[{"role":"user","content":"a","x":[%b]}]}', b"{}"),
    "metadata": ("/v1/chat/completions", b'{"messages":[],"metadata":{"x":[%b]}}', b"[1.5]"),
    "keys": ("/v1/chat/completions", b'{"messages":[],%b}', b'"a":1'),
    "mixed": ("/v1/completions", b'{"prompt":[%b]}', b'1,"a",[1]'),
    "ids": ("/v1/completions", b'{"prompt":[%b]}', b"1"),
    "floats": ("/v1/completions", b'{"prompt":[%b]}', b"1.5"),
    "nulls": ("/v1/completions", b'{"prompt":[%b]}', b"null"),
    "brackets": ("/v1/completions", b'{"prompt":%b', b"["),
    "quotes": ("/v1/completions", b'{"prompt":["%b"]}', b'""'),
    "escapes": ("/v1/completions", b'{"prompt":"%b"}', b'\\\\\\"'),
    "texts": ("/v1/embeddings", b'{"input":[%b]}', b'"a"'),
    "tokens": ("/detokenize", b'{"tokens":[%b]}', b"65"),
    "blocks": ("/v1/messages", b'{"max_tokens":1,"model":"m","messages":[],"system":[%b]}', b"{}"),
    "items": ("/v1/responses", b'{"input":[%b]}', b"{}"),
}


@pytest.mark.parametrize("name", COSTLY)
def test_a_refusal_costs_no_more_than_the_request(mock_server: Server, name: str):
    path, frame, item = COSTLY[name]
    with cheap(mock_server):
        response = httpx.post(f"{mock_server.url}{path}", content=frame % repeated(item, 16 * 2**20), timeout=60)
    assert response.status_code in (400, 413), response.text[:200]
    assert response.json()["error"]["message"]


CHAT = b'{"max_tokens":1,"messages":[{"role":"user","content":"a"}],%b}'
BIG = 8 * 2**20  # each is one value, or as many as a body may hold: the count of values does not end it
LARGE = {
    "one emoji": ("/v1/completions", b'{"prompt":"\xf0\x9f\x98\x80' + b"a" * BIG + b'"}'),
    "escapes": ("/v1/completions", b'{"prompt":"' + b"\\u0041" * (BIG // 6) + b'"}'),
    "half pairs": ("/v1/completions", b'{"prompt":"\\ud800' + b"\\\\\\ud83d\\ude00" * (BIG // 14 - 9) + b'"}'),
    "white space": ("/v1/completions", b'{"max_tokens":1,"prompt":"a"' + b" " * BIG + b"}"),
    "key": ("/v1/chat/completions", CHAT % (b'"%b":1' % (b"a" * BIG))),
    "key of a message": ("/v1/chat/completions", b'{"messages":[{"role":"user","content":"a","%b":1}]}' % (b"a" * BIG)),
    "role": ("/v1/chat/completions", b'{"messages":[{"role":"%b","content":"a"}]}' % (b"a" * BIG)),
    "endless numbers": ("/v1/chat/completions", CHAT % b'"metadata":{"a":[%b]}' % b",".join([b"1e999"] * 150_000)),
    "long numbers": ("/v1/completions", b'{"prompt":"a","x":[%b]}' % b",".join([b"1" * 4300] * (BIG // 4300))),
    "many digits": ("/v1/completions", b'{"prompt":"a","x":[%b]}' % b",".join([b"1." + b"1" * 200] * (BIG // 203))),
    "unknown fields": ("/v1/chat/completions", CHAT % b",".join(b'"a%d":1' % at for at in range(39_000))),
    "messages": ("/v1/messages", b'{"max_tokens":1,"model":"m","messages":[%b]}'
                 % b",".join([b'{"role":"user","content":"a"}'] * 7900)),
    "arguments": ("/v1/chat/completions", b'{"messages":[{"role":"assistant","tool_calls":[{"function":{"name":"f","arguments":'
                  b'"{\\"a\\":[%b]}"}}]},{"role":"user","content":"a"}]}' % b",".join([b"{}"] * (BIG // 3))),
    "schema": ("/v1/chat/completions", CHAT % b'"guided_json":"%b"' % (b"a" * BIG)),
    "schema in a text": ("/v1/chat/completions", CHAT % b'"guided_json":"{\\"anyOf\\":[%b]}"' % b",".join([b"{}"] * (BIG // 3))),
    "field that breaks off": ("/v1/completions", b'{"x":[%b"%b' % (b"{}," * 39_999, b'\\"' * 30_000 + b'",' * 9)),
}  # fmt: skip


@pytest.mark.parametrize("name", LARGE)
def test_no_single_body_costs_the_api_process_much(mock_server: Server, name: str):
    path, body = LARGE[name]
    process = psutil.Process(mock_server.process.pid)
    begin_s, before = sum(process.cpu_times()[:2]), process.memory_info().rss
    most = before
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(httpx.post, f"{mock_server.url}{path}", content=body, timeout=60)
        while not asked.done():
            most = max(most, process.memory_info().rss)
            time.sleep(0.01)
    assert asked.result().status_code in (200, 400), asked.result().text
    assert sum(process.cpu_times()[:2]) - begin_s < AT_MOST_S
    assert most - before < 3 * len(body) + 24 * 2**20, "what thousands of small objects need in any case"


def test_no_short_request_has_the_api_process_keep_millions_of_logprobs(mock_server: Server):
    """4,000 tokens of each of 128 answers, 21 entries each, would be 10 million."""
    process = psutil.Process(mock_server.process.pid)
    before = most = process.memory_info().rss
    body = {**json.loads(BODY), "n": 128, "logprobs": True, "top_logprobs": 20, "max_tokens": 4000, "ignore_eos": True}
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(httpx.post, f"{mock_server.url}/v1/chat/completions", json=body, timeout=120)
        while not asked.done():
            most = max(most, process.memory_info().rss)
            time.sleep(0.01)
    assert asked.result().status_code == 400 and "log-probabilities" in asked.result().text
    assert most - before < 250 * 2**20
    assert httpx.get(f"{mock_server.url}/health", timeout=30).status_code == 200


def test_a_mixed_list_is_refused_at_its_first_wrong_item(mock_server: Server):
    body = {"prompt": [1, "a", [1]] * 3000}
    start_s = time.process_time()
    response = httpx.post(f"{mock_server.url}/v1/completions", json=body, timeout=60)
    assert response.status_code == 400 and len(response.content) < 1000
    assert time.process_time() - start_s < 5


def test_pipelined_requests_are_answered_in_order_and_do_not_pile_up(mock_server: Server):
    found = answers(mock_server, (GET + b"\r\n") * 5 + POST + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY, 6)
    assert found.count(b"HTTP/1.1 200") == 6
    small = b"GET / HTTP/1.1\r\nHost:localhost\r\n\r\n"
    with cheap(mock_server):
        connections = []
        for _ in range(20):
            connection = socket.create_connection(("127.0.0.1", mock_server.port), timeout=10)
            connection.settimeout(0.2)
            connections.append(connection)
            with suppress(OSError):
                connection.sendall(small * (2**20 // len(small)))
        time.sleep(1)
        for connection in connections:
            connection.close()


@pytest.mark.parametrize("part", ["trailers", "extension", "header", "newlines", "one chunk"])
def test_no_part_of_http_is_endless(model: Path, part: str):
    chunked = b"Transfer-Encoding: chunked\r\n\r\n"
    begin, more = {
        "trailers": (GET + chunked + b"0\r\n", b"a: b\r\n" * 10_000),
        "extension": (GET + chunked + b"5;", b"a" * 60_000),
        "header": (GET + b"a: ", b"a" * 60_000),
        "newlines": (b"\r\n", b"\r\n" * 30_000),
        "one chunk": (GET + chunked + b"7fffffff\r\n", b"a" * 60_000),
    }[part]
    limits = {"header_timeout_s": 1.0, "body_timeout_s": 1.0, "max_body_bytes": 2**20}
    with serving(model, **limits) as server, cheap(server), connected(server) as connection:
        start_s, sent = time.monotonic(), 0
        with pytest.raises(OSError):
            connection.sendall(begin)
            while True:
                sent += connection.send(more)
                time.sleep(0.001)
                assert time.monotonic() - start_s < 30, f"{sent} bytes and no end"


def chunks_of(size: int, body: bytes) -> bytes:
    parts = [body[start : start + size] for start in range(0, len(body), size)]
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (*parts, b""))


def test_a_body_in_small_chunks_is_read(mock_server: Server):
    """As programs send it that write JSON word by word, and a short one byte by byte."""
    long = b'{"messages": [{"role": "user", "content": "%b"}], "max_tokens": 2}' % (b"hello " * 600)
    for size, body in ((8, long), (1, BODY)):
        found = answers(
            mock_server, POST + b"Transfer-Encoding: chunked\r\n\r\n" + chunks_of(size, body) + GET + b"\r\n", 2
        )
        assert found.count(b"HTTP/1.1 200") == 2, size


def test_chunks_of_a_byte_each_cost_no_more_than_other_requests(mock_server: Server):
    """20 connections with 150,000 chunks each: what is little but framing ends soon."""
    data = POST + b"Transfer-Encoding: chunked\r\n\r\n" + b"1\r\n \r\n" * 150_000
    with ExitStack() as stack, cheap(mock_server):
        for _ in range(20):
            connection = stack.enter_context(connected(mock_server))
            with suppress(OSError):
                connection.sendall(data)
        time.sleep(1)


def test_work_ends_with_its_client_whatever_else_it_sent(model: Path):
    long = json.dumps({"prompt": "a", "max_tokens": 4000, "ignore_eos": True}).encode()
    with serving(model, step_s=0.02) as server:
        for behind in (b"", (GET + b"\r\n") * 3, b"GET / HTT", POST + b"Content-Length: 100\r\n\r\n{"):
            request = b"POST /v1/completions HTTP/1.1\r\n" + HOST + b"Content-Length: %d\r\n\r\n" % len(long) + long
            with connected(server) as connection:
                connection.sendall(request + behind)
                eventually(lambda: server.figures()["running"] == 1, 10, "the request's start")
            eventually(lambda: server.figures()["running"] == 0, 10, "its end")


OFFER = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQBAAAAAAIAAAAA\r\n"


@pytest.mark.parametrize(
    "offer", [OFFER, OFFER.replace(b"h2c", b"websocket"), OFFER.replace(b"Upgrade:", b"UPGRADE :")]
)
def test_an_offer_of_another_protocol_is_ignored(mock_server: Server, offer: bytes):
    found = answers(mock_server, POST + offer + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY + GET + b"\r\n", 2)
    if b"UPGRADE :" in offer:  # no header at all
        assert found.startswith(b"HTTP/1.1 400")
    else:
        assert found.count(b"HTTP/1.1 200") == 2


@pytest.mark.parametrize("coding", [b": chunked", b":chunked", b":\t Chunked"])
def test_chunked_bodies_are_read(mock_server: Server, coding: bytes):
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (BODY[:7], BODY[7:], b""))
    found = answers(mock_server, POST + b"Transfer-Encoding" + coding + b"\r\n\r\n" + chunks + GET + b"\r\n", 2)
    assert found.count(b"HTTP/1.1 200") == 2


@pytest.mark.parametrize("more", [b"", b"Connection: keep-alive\r\n", b"Expect: 100-continue\r\n"])
@pytest.mark.parametrize("streams", [True, False])
def test_an_answer_in_http_1_0_ends_with_the_connection(mock_server: Server, more: bytes, streams: bool):
    body = json.dumps({**json.loads(BODY), "stream": streams}).encode()
    found = b""
    with connected(mock_server) as connection:
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.0\r\n" + more + b"Content-Length: %d\r\n\r\n" % len(body) + body
        )
        while part := connection.recv(65536):
            found += part
    head, _, answer = found.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200") and b"transfer-encoding" not in head.lower()
    if streams:
        assert answer.startswith(b"data: {") and answer.endswith(b"data: [DONE]\n\n")
    else:
        assert len(answer) == int(
            httpx.Headers([line.split(b": ", 1) for line in head.split(b"\r\n")[1:]])["content-length"]
        )


@pytest.mark.parametrize(
    ("line", "status"),
    [
        (b"GET /health HTTP/1.2", 200), (b"GET /health HTTP/2.0", 505), (b"GET /health HTTP/0.9", 505), (b"GET /health HTTP/3.1", 505),
        (b"PRI * HTTP/2.0", 505), (b"GET /health", 400), (b"GET /health http/1.1", 400), (b"BREW /health HTTP/1.1", 501),
        (b"GET http://127.0.0.1/health HTTP/1.1", 200), (b"GET /" + b"a" * 70_000 + b" HTTP/1.1", 414),
        (b"POST /v1/completions HTTP/1.1\r\nTransfer-Encoding: gzip, chunked", 501),
    ],
)  # fmt: skip
def test_versions_methods_and_codings_that_are_not_known(mock_server: Server, line: bytes, status: int):
    found = answers(mock_server, line + b"\r\n" + HOST + b"Connection: close\r\n\r\n")
    assert found.startswith(b"HTTP/1.1 %d " % status), found


PAGE = {"origin": "https://evil.example", "sec-fetch-site": "cross-site"}


@pytest.mark.parametrize(
    "path", ["/v1/chat/completions", "/v1/completions", "/v1/messages", "/tokenize", "/detokenize"]
)
def test_a_page_of_another_site_has_nothing_computed(mock_server: Server, path: str):
    url = mock_server.url
    unknown = {"sec-fetch-site": "a browser of tomorrow"}
    for headers in (
        PAGE,
        {"origin": "null"},
        {"origin": ""},
        {"sec-fetch-site": "cross-site"},
        {"origin": "http://127.0.0.1:1"},
        unknown,
    ):
        for kind in ("text/plain", "application/json", "application/x-www-form-urlencoded"):
            response = httpx.post(f"{url}{path}", content=BODY, headers={**headers, "content-type": kind})
            assert response.status_code == 403, (headers, kind)
    own = {"origin": url, "sec-fetch-site": "same-origin", "content-type": "text/plain"}
    assert httpx.post(f"{url}{path}", content=BODY, headers=own).status_code == 415


def test_the_servers_own_page_and_programs_may_ask(mock_server: Server):
    url = f"{mock_server.url}/v1/chat/completions"
    own = {
        "origin": mock_server.url,
        "sec-fetch-site": "same-origin",
        "content-type": "application/json; charset=utf-8",
    }
    assert httpx.post(url, content=BODY, headers=own).status_code == 200
    assert httpx.post(url, content=BODY, headers={"content-type": "text/plain"}).status_code == 200  # curl -d


def test_a_client_that_leaves_in_the_middle_of_its_body_is_no_bug_of_ours(model: Path):
    with serving(model) as server:
        for sent in (BODY[:20], b""):
            with connected(server) as connection:
                connection.sendall(POST + b"Content-Length: %d\r\n\r\n" % len(BODY) + sent)
                time.sleep(0.1)
        time.sleep(0.3)
        assert "Traceback" not in server.log.read_text() and "bug" not in server.log.read_text()


def test_no_query_is_logged(model: Path):
    with serving(model) as server:
        httpx.get(f"{server.url}/v1/models?api_key=a-secret-that-nobody-sees")
        eventually(lambda: "/v1/models?..." in server.log.read_text(), 5, "the line")
        assert "a-secret" not in server.log.read_text()

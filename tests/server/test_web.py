"""``fastqwen web``: somebody else's server behind our page."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest

from fastqwen.errors import BadConfig, UpstreamGone
from fastqwen.server.web import upstream
from fastqwen.server.web.upstream import Upstream, Upstreams
from tests.server.live import LiveServer, events, eventually, one_line, run
from tests.server.web_process import web

CHAT = "/v1/chat/completions"
STORY = {
    "messages": [{"role": "user", "content": "Tell me a very long story about a lighthouse."}],
    "temperature": 0,
    "stream": True,
}
ENDLESS = {**STORY, "ignore_eos": True}


class Other:
    """A server with manners of its own: ``answer`` gets each request and writes what it likes."""

    def __init__(self, answer: Callable[[BaseHTTPRequestHandler], None]) -> None:
        self.asked: list[tuple[str, dict[str, str], bytes]] = []
        other = self

        class Handler(BaseHTTPRequestHandler):
            def handle_one(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                other.asked.append((self.path, {k.lower(): v for k, v in self.headers.items()}, body))
                answer(self)

            do_GET = do_POST = handle_one

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def other(request: pytest.FixtureRequest) -> Iterator[Other]:
    found = Other(request.param)
    yield found
    found.close()


def send(to: BaseHTTPRequestHandler, status: int, body: bytes, **headers: str) -> None:
    to.send_response(status)
    for name, value in {"content_type": "application/json", **headers}.items():
        to.send_header(name.replace("_", "-"), value)
    to.end_headers()
    to.wfile.write(body)


def plain_openai(to: BaseHTTPRequestHandler) -> None:
    """What every OpenAI-compatible server has, and no more."""
    if to.path == "/api/v1/models":
        send(to, 200, b'{"object": "list", "data": [{"id": "theirs", "object": "model"}]}', set_cookie="a=b")
    elif to.path == "/api/v1/chat/completions":
        send(
            to,
            200,
            b'data: {"choices": [{"delta": {"content": "Hi"}}]}\n\ndata: [DONE]\n\n',
            content_type="text/event-stream",
        )
    else:
        send(to, 404, b'{"detail": "Not Found"}')


def strict(to: BaseHTTPRequestHandler) -> None:
    if to.headers.get("authorization") != "Bearer the-right-key":
        send(to, 401, b'{"error": {"message": "bad key", "type": "x", "param": null, "code": "invalid_api_key"}}')
    else:
        send(to, 200, b'{"data": [{"id": "theirs"}]}')


def website(to: BaseHTTPRequestHandler) -> None:
    send(to, 200, b"<html>Welcome</html>", content_type="text/html")


def moved(to: BaseHTTPRequestHandler) -> None:
    send(to, 301, b"", location="http://169.254.169.254/latest")


def breaking(to: BaseHTTPRequestHandler) -> None:
    """Promises more than it sends, and stops in the middle of an event."""
    body = b'data: {"choices": [{"delta": {"content": "Hi"}}]}\n\ndata: {"cho'
    send(to, 200, body, content_type="text/event-stream", content_length="1000")
    to.wfile.flush()
    to.connection.shutdown(socket.SHUT_RDWR)


def test_our_own_server_behind_the_page(server: LiveServer):
    with web(server.url) as page:
        assert page.http.get("/health/ready").json()["status"] == "ready"
        [model] = page.http.get("/v1/models").json()["data"]
        assert model["id"] == "demo" and model["max_model_len"] > 0
        asked = {"messages": [{"role": "user", "content": "What is the capital of France?"}], "temperature": 0}
        answer = page.http.post(CHAT, json=asked).json()
        assert answer["choices"][0]["message"]["content"] == "The capital of France is Paris."
        with page.http.stream("POST", CHAT, json={**asked, "stream": True}) as response:
            lines = events(response.iter_lines())
        assert lines[-1] == "[DONE]"
        text = "".join(json.loads(line)["choices"][0]["delta"].get("content", "") for line in lines[:-1])
        assert text == answer["choices"][0]["message"]["content"]
        assert page.http.post("/tokenize", json={"messages": asked["messages"]}).json()["count"] > 5
        assert page.http.get("/admin/data").json()["model"] == "demo"
        assert "vllm:" in page.http.get("/metrics").text
        assert "app.js" in page.http.get("/").text and "admin.js" in page.http.get("/admin").text


def test_tokens_come_one_by_one(server: LiveServer):
    with web(server.url) as page, page.http.stream("POST", CHAT, json={**ENDLESS, "max_tokens": 300}) as response:
        arrived = [time.monotonic() for line in response.iter_lines() if line]
    assert len(arrived) > 30
    assert arrived[-1] - arrived[0] > 0.2, "the answer was kept back until it was whole"


def test_a_closed_browser_aborts_the_answer_behind(server: LiveServer):
    with web(server.url) as page:
        with page.http.stream("POST", CHAT, json=ENDLESS) as response:
            lines = response.iter_lines()  # kept: whoever drops it closes the stream
            next(lines)
            eventually(lambda: server.metric("num_requests_running") == 1, 5, "a running answer")
        eventually(server.is_idle, 3, "an abort")
        with pytest.raises(httpx.ReadTimeout):
            page.http.post(CHAT, json={**ENDLESS, "stream": False}, timeout=0.7)
        eventually(server.is_idle, 3, "an abort of an answer in one piece")


PRIVATE = (
    "/v1/embeddings",
    "/v1/files",
    "/v1/chat/completions/x",
    "/x",
    "/http://evil.example/v1/models",
    "/openapi.json",
    "/docs",
)


@pytest.mark.parametrize("other", [plain_openai], indirect=True)
def test_only_listed_paths_are_passed_on(other: Other):
    with web(f"{other.url}/api/v1/", arguments=("--api-key", "a-secret")) as page:
        before = len(other.asked)
        for path in PRIVATE:
            for method in ("GET", "POST", "PUT", "DELETE"):
                assert page.http.request(method, path).status_code in (404, 405), (method, path)
        assert page.http.request("CONNECT", "/v1/models").status_code in (404, 405)
        asked = httpx.Client(proxy=str(page.http.base_url)).get("http://evil.example/")
        assert asked.status_code == 403, "a Host that is not ours"
        assert [path for path, _, _ in other.asked[before:]] == []


@pytest.mark.parametrize("other", [plain_openai], indirect=True)
def test_the_key_goes_to_the_server_and_never_to_the_browser(other: Other):
    with web(f"{other.url}/api/v1", FASTQWEN_API_KEY="the-operators-key") as page:
        seen = [
            page.http.get("/v1/models"),
            page.http.post(CHAT, json=STORY),
            page.http.get("/"),
            page.http.get("/health/ready"),
        ]
        assert all("the-operators-key" not in f"{one.text} {one.headers}" for one in seen)
        assert "the-operators-key" not in page.log
        assert "set-cookie" not in seen[0].headers
        page.http.get("/v1/models", headers={"authorization": "Bearer another"})
        assert {headers["authorization"] for _, headers, _ in other.asked} == {"Bearer the-operators-key"}
        assert {path for path, _, _ in other.asked} <= {
            "/api/v1/models",
            "/api/v1/chat/completions",
            "/api/health/ready",
        }


@pytest.mark.parametrize("other", [strict], indirect=True)
def test_a_key_that_the_server_wants(other: Other):
    with web(other.url) as page:
        assert "wants an API key" in page.log
        assert page.http.get("/v1/models").status_code == 401
        mine = {"authorization": "Bearer the-right-key"}
        assert page.http.get("/v1/models", headers=mine).json()["data"][0]["id"] == "theirs"
    with web(other.url, arguments=("--api-key", "wrong")) as page:
        refused = page.http.get("/v1/models")
        assert refused.status_code == 502 and "--api-key" in refused.json()["error"]["message"]
        assert "refused the key" in page.log


@pytest.mark.parametrize(
    ("other", "words"), [(website, "no OpenAI-compatible API"), (moved, "sends on to")], indirect=["other"]
)
def test_a_wrong_address_is_named(other: Other, words: str):
    with web(other.url) as page:
        assert words in page.log
        for found in (page.http.get("/v1/models"), page.http.get("/health/ready"), page.http.post(CHAT, json=STORY)):
            assert found.status_code == 502
            assert words in found.json()["error"]["message"]


def test_nobody_behind_and_then_somebody():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
    with web(url) as page:
        found = page.http.get("/v1/models")
        assert found.status_code == 502
        assert found.json()["error"]["code"] == "upstream_gone" and url in found.json()["error"]["message"]
        assert page.http.get("/").status_code == 200, "the page itself is there to say so"


@pytest.mark.parametrize("other", [breaking], indirect=True)
def test_a_connection_that_breaks_ends_in_an_error_event(other: Other):
    with web(other.url) as page, page.http.stream("POST", CHAT, json=STORY) as response:
        first, error = events(response.iter_lines())
        assert json.loads(first)["choices"][0]["delta"]["content"] == "Hi"
        assert "broke in the middle" in json.loads(error)["error"]["message"]


@pytest.mark.parametrize("other", [plain_openai], indirect=True)
def test_two_servers_as_one(other: Other, server: LiveServer):
    with web(server.url, f"{other.url}/api/v1") as page:
        assert [model["id"] for model in page.http.get("/v1/models").json()["data"]] == ["demo", "theirs"]
        assert "Hi" in page.http.post(CHAT, json={**STORY, "model": "theirs"}).text
        path, headers, body = other.asked[-1]
        assert json.loads(body)["model"] == "theirs" and "authorization" not in headers
        ours = page.http.post(CHAT, json={**STORY, "model": "demo", "stream": False, "max_tokens": 4})
        assert ours.json()["model"] == "demo" and other.asked[-1] == (path, headers, body)
        mine = {"authorization": "Bearer for-one-of-them"}
        page.http.post(CHAT, json={**STORY, "model": "theirs"}, headers=mine)
        assert "authorization" not in other.asked[-1][1], "a visitor's key is for one server, not for all"


@pytest.mark.parametrize("other", [plain_openai], indirect=True)
def test_two_models_of_one_name_are_told_apart(other: Other):
    twin = Other(plain_openai)
    try:
        with web(
            f"{other.url}/api/v1", f"{twin.url}/api/v1", arguments=("--api-key", "first", "--api-key", "none")
        ) as page:
            names = [model["id"] for model in page.http.get("/v1/models").json()["data"]]
            assert names == [f"theirs @ {one.url.removeprefix('http://')}" for one in (other, twin)]
            page.http.post(CHAT, json={**STORY, "model": names[1]})
            assert json.loads(twin.asked[-1][2])["model"] == "theirs"
            assert "authorization" not in twin.asked[-1][1] and other.asked[-1][1]["authorization"] == "Bearer first"
    finally:
        twin.close()


def test_other_machines_need_a_page_key():
    public = ("web", "--api", "http://127.0.0.1:1", "--host", "0.0.0.0", "--port", "0")
    line = one_line(run(*public, FASTQWEN_API_KEY="the-key-of-the-server-behind"))
    assert "FASTQWEN_PAGE_KEY" in line and "--insecure" in line


@pytest.mark.parametrize("other", [strict], indirect=True)
def test_a_page_key_is_never_tried_on_the_server_behind(other: Other):
    with web(other.url, FASTQWEN_PAGE_KEY="a-key-for-visitors") as page:
        found = page.http.get("/v1/models", headers={"authorization": "Bearer a-key-for-visitors"})
        assert found.status_code == 502 and "who runs this page" in found.json()["error"]["message"]
        assert not any("authorization" in headers for _, headers, _ in other.asked)


def test_a_page_key_is_asked_for_and_not_passed_on(server: LiveServer):
    with web(server.url, FASTQWEN_PAGE_KEY="a-key-for-visitors") as page:
        assert page.http.get("/").status_code == 200
        for path in ("/v1/models", "/admin/data", "/metrics", "/health/ready"):
            is_open = path == "/health/ready"
            assert (page.http.get(path).status_code == 401) != is_open
        mine = {"authorization": "Bearer a-key-for-visitors"}
        assert page.http.get("/v1/models", headers=mine).status_code == 200


@pytest.mark.parametrize("other", [plain_openai], indirect=True)
def test_other_sites_cannot_spend_the_operators_key(other: Other):
    with web(f"{other.url}/api/v1", arguments=("--api-key", "a-secret")) as page:
        asked = len(other.asked)
        evil = page.http.post(CHAT, json=STORY, headers={"origin": "https://evil.example"})
        assert evil.status_code == 403 and len(other.asked) == asked
        own = page.http.post(CHAT, json=STORY, headers={"origin": str(page.http.base_url).rstrip("/")})
        assert own.status_code == 200
        assert page.http.get("/v1/models", headers={"host": "evil.example"}).status_code == 403


def test_ctrl_c_lets_a_running_answer_finish(server: LiveServer):
    with web(server.url) as page, page.http.stream("POST", CHAT, json={**STORY, "max_tokens": 40}) as response:
        lines = response.iter_lines()
        next(lines)
        page.process.send_signal(signal.SIGINT)
        assert events(lines)[-1] == "[DONE]"
        assert page.process.wait(10) == 0


@pytest.mark.parametrize(
    "url", ["localhost:8000", "ftp://host/v1", "http://", "http://me:secret@host/v1", "http://host/v1?key=1"]
)
def test_addresses_that_are_none(url: str):
    line = one_line(run("web", "--api", url, "--port", "0"))
    assert "--api" in line and "secret" not in line


def test_keys_are_given_one_for_each_server():
    with pytest.raises(BadConfig, match="same order"):
        Upstreams(["http://a", "http://b"], ["only-one"])
    with pytest.raises(BadConfig, match="twice"):
        Upstreams(["http://a", "http://a"], [])
    assert [one.has_key for one in Upstreams(["http://a", "http://b"], ["none", "x"]).all] == [False, True]


@pytest.mark.parametrize(
    "url", ["http://host:1", "http://host:1/", "http://host:1/v1", "http://host:1/v1/chat/completions"]
)
def test_the_address_may_end_as_people_write_it(url: str):
    found = Upstream(url, None)
    assert (found._root, found._api) == ("http://host:1", "http://host:1/v1")


def test_a_server_that_says_continue_ten_thousand_times_and_then_nothing_is_given_up():
    async def burst(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n" * 10_000)
        with contextlib.suppress(OSError):
            await writer.drain()
            await reader.read()

    async def run() -> None:
        listening = await asyncio.start_server(burst, "127.0.0.1", 0)
        async with listening:
            port = listening.sockets[0].getsockname()[1]
            with pytest.raises(UpstreamGone, match="no answer among them"):
                await asyncio.wait_for(Upstream(f"http://127.0.0.1:{port}/v1", None).open("GET", "/v1/models"), 30)

    asyncio.run(run())


def test_a_server_that_only_ever_says_continue_is_given_up(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(upstream, "ANSWER_WITHIN_S", 0.5)

    async def trickle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        while not writer.is_closing():
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            await asyncio.sleep(0.02)

    async def run() -> None:
        listening = await asyncio.start_server(trickle, "127.0.0.1", 0)
        async with listening:
            port = listening.sockets[0].getsockname()[1]
            with pytest.raises(UpstreamGone, match=r"no answer within 0\.5 s"):
                await asyncio.wait_for(Upstream(f"http://127.0.0.1:{port}/v1", None).open("GET", "/v1/models"), 30)

    asyncio.run(run())

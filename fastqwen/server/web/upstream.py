"""Other servers with an OpenAI-compatible API, reached only at the addresses that the operator gave."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, Sequence
from typing import Any, TypeVar

import anyio
import httpx
import msgspec
from starlette.types import Receive, Scope, Send

from fastqwen.errors import BadConfig, UpstreamGone
from fastqwen.server.http.body import joined
from fastqwen.server.http.heads import bound_heads, head_awaited
from fastqwen.server.http.sse import EventStream
from fastqwen.version import __version__

CONNECT_WITHIN_S = 10.0
ANSWER_WITHIN_S = 600.0  # a long prompt in a long queue
LIST_WITHIN_S = 10.0
MAX_ANSWER_BYTES = 32 * 2**20
MAX_LINE_BYTES = 4 * 2**20
ANSWERS = frozenset({200, *range(400, 600)})  # no other status comes with an answer to what is asked here
NO_KEY = "none"
HOPS = "x-fastqwen-hops"
REFUSALS = (401, 403, 429, 503)  # an API's word that it is one, but not now or not for this key
Answer = TypeVar("Answer")
VERSION = re.compile(r"/v\d+\w*$")


class Upstream:
    """One server. Its address may end in /v1, as OpenAI's clients want it, or not. Raises BadConfig, then UpstreamGone."""

    def __init__(
        self,
        url: str,
        key: str | None,
        *,
        visitors_keys: bool = False,
        flag: str = "--api",
        key_flag: str = "--api-key or FASTQWEN_API_KEY",
    ) -> None:
        """``flag`` and ``key_flag`` are what errors name."""
        self._flag, self._key_flag = flag, key_flag
        self.url = url.rstrip("/").removesuffix("/chat/completions")
        try:
            parsed = httpx.URL(self.url)
        except httpx.InvalidURL as error:
            raise BadConfig(f"{flag} {url} is not an address: {error}") from None
        if parsed.scheme not in ("http", "https") or not parsed.host or parsed.query or parsed.fragment:
            raise BadConfig(f"{flag} {url} is not an address like http://localhost:8000/v1")
        if parsed.userinfo:
            raise BadConfig(f"{flag} holds a password: give it with {key_flag} instead")
        self.place = parsed.netloc.decode("ascii")
        self.has_key = key is not None
        self._visitors_keys = visitors_keys and key is None
        self._root = VERSION.sub("", self.url)
        self._api = self.url if VERSION.search(self.url) else f"{self.url}/v1"
        headers = {"accept-encoding": "identity", "user-agent": f"fastqwen/{__version__}"}
        if key is not None:
            headers["authorization"] = f"Bearer {key}"
        self._client = bound_heads(
            httpx.AsyncClient(
                headers=headers,
                timeout=httpx.Timeout(ANSWER_WITHIN_S, connect=CONNECT_WITHIN_S),
                limits=httpx.Limits(max_connections=None),
            )
        )

    async def open(
        self, method: str, path: str, *, body: bytes | None = None, key: str | None = None, hops: int = 0
    ) -> httpx.Response:
        """The answer with its body still to come: the caller closes it. ``key`` is a visitor's own; ``hops`` tells another
        cluster's front end through how many such servers the request came."""
        address = self._api + path.removeprefix("/v1") if path.startswith("/v1/") else self._root + path
        headers = {"content-type": "application/json"} if body is not None else {}
        if key is not None and self._visitors_keys:
            headers["authorization"] = key
        if hops:
            headers[HOPS] = str(hops)
        request = self._client.build_request(method, address, content=body, headers=headers)
        try:
            async with asyncio.timeout(ANSWER_WITHIN_S):  # httpx counts from byte to byte
                with head_awaited():
                    response = await self._client.send(request, stream=True)
        except httpx.HTTPError as error:
            raise self._silent(error) from None
        except TimeoutError:
            raise UpstreamGone(f"{self.url} gave no answer within {ANSWER_WITHIN_S:g} s") from None
        problem = self._problem(response)
        if problem is not None:
            await response.aclose()
            raise UpstreamGone(problem)
        return response

    async def ask(
        self, method: str, path: str, *, body: bytes | None = None, key: str | None = None
    ) -> tuple[int, str, bytes]:
        """Status, content type and body of an answer that is soon there."""
        try:
            async with asyncio.timeout(LIST_WITHIN_S):
                response = await self.open(method, path, body=body, key=key)
                return response.status_code, response.headers.get("content-type", ""), await self.read(response)
        except TimeoutError:
            raise UpstreamGone(
                f"{self.url} accepts connections, but gave no answer within {LIST_WITHIN_S:g} s"
            ) from None

    async def read(self, response: httpx.Response) -> bytes:
        try:
            body = await joined(response.aiter_bytes(), MAX_ANSWER_BYTES)
        except httpx.HTTPError as error:
            raise self._silent(error) from None
        finally:
            await response.aclose()
        if body is None:
            raise UpstreamGone(f"{self.url} sends more than {MAX_ANSWER_BYTES} bytes at once")
        return bytes(body)

    async def lines(self, response: httpx.Response) -> AsyncGenerator[bytes, None]:
        """The body as it comes, in whole lines, so that an error event after a broken one can still be read."""
        rest = bytearray()
        try:
            async for part in response.aiter_bytes():
                whole, newline, left = part.rpartition(b"\n")
                if newline:
                    yield bytes(rest) + whole + newline
                    rest.clear()
                rest += left
                if len(rest) > MAX_LINE_BYTES:
                    yield b"\n"
                    raise UpstreamGone(f"{self.url} sends a line of more than {MAX_LINE_BYTES} bytes")
        except httpx.HTTPError:
            yield b"\n"
            raise UpstreamGone(f"the connection to {self.url} broke in the middle of the answer") from None
        if rest:
            yield bytes(rest)

    async def models(self, key: str | None) -> tuple[int, list[dict[str, Any]], bytes]:
        """Status, the models, and the body where it is a refusal."""
        status, _, body = await self.ask("GET", "/v1/models", key=key)
        if status in REFUSALS:
            return status, [], body
        try:
            listed: Any = msgspec.json.decode(body)["data"] if status == 200 else None
            return status, [{**one, "id": str(one["id"])} for one in listed], body
        except (msgspec.DecodeError, RecursionError, KeyError, TypeError):
            raise UpstreamGone(
                f"{self.url} is no OpenAI-compatible API: it answers {self._api}/models with status {status} and no list "
                f"of models; {self._flag} takes the address up to and including /v1"
            ) from None

    async def close(self) -> None:
        await self._client.aclose()

    def _problem(self, response: httpx.Response) -> str | None:
        if response.is_redirect:
            return f"{self.url} sends on to {response.headers.get('location', '?')[:200]}: give that address to {self._flag}"
        if response.status_code not in ANSWERS:
            return f"{self.url} answers with status {response.status_code}, which is no answer to what was asked"
        if response.headers.get("content-encoding", "identity") != "identity":
            return f"{self.url} sends its answer compressed, which it was not asked for"
        if response.status_code == 401 and self.has_key:
            return f"{self.url} refused the key that this page was started with: check {self._key_flag}"
        if response.status_code == 401 and not self._visitors_keys:
            return f"{self.url} wants an API key: who runs this page gives it with {self._key_flag}"
        return None

    def _silent(self, error: Exception) -> UpstreamGone:
        reason = str(error) or type(error).__name__
        return UpstreamGone(
            f"{self.url} cannot be reached ({reason}): is that server running, and is {self._flag} right?"
        )


class Relay(EventStream):
    """A stream that is passed on. When the browser is gone, the connection behind is closed, which aborts the answer there."""

    def __init__(self, upstream: Upstream, response: httpx.Response, *, stall_timeout_s: float) -> None:
        super().__init__(upstream.lines(response), stall_timeout_s=stall_timeout_s, done=b"")
        self._response = response

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            with anyio.CancelScope(shield=True):
                await self._response.aclose()


class Upstreams:
    """Several servers as one: their lists of models joined, each request sent to the one that has its model.

    What a visitor typed as a key is for the one server that asked for it, never for one of several, and no page key.
    """

    def __init__(self, urls: Sequence[str], keys: Sequence[str], *, page_has_keys: bool = False) -> None:
        if len(set(urls)) < len(urls):
            raise BadConfig("--api names the same address twice")
        if keys and len(keys) != len(urls):
            raise BadConfig(
                f"there are {len(urls)} --api and {len(keys)} keys: give one --api-key for each, in the same order "
                f"({NO_KEY} for a server without), so that no server gets another one's"
            )
        wanted = [None if key == NO_KEY else key for key in keys] or [None] * len(urls)
        visitors_keys = len(urls) == 1 and not page_has_keys
        self.all = [Upstream(url, key, visitors_keys=visitors_keys) for url, key in zip(urls, wanted, strict=True)]
        self._place_of: dict[str, tuple[Upstream, str]] = {}  # the name that the page sees -> whose, and its name there

    @property
    def first(self) -> Upstream:
        return self.all[0]

    async def models(self, key: str | None) -> tuple[int, list[dict[str, Any]], bytes]:
        """Those of the servers that answer. With none: what the first one said, or UpstreamGone."""
        found = await asyncio.gather(*(one.models(key) for one in self.all), return_exceptions=True)
        listed: list[tuple[Upstream, dict[str, Any]]] = []
        for upstream, one in zip(self.all, found, strict=True):
            if not isinstance(one, BaseException):
                listed += [(upstream, model) for model in one[1]]
        if not listed:
            return _or_raise(found[0])
        names = [model["id"] for _, model in listed]
        shown = []
        for upstream, model in listed:
            name = model["id"] if names.count(model["id"]) == 1 else f"{model['id']} @ {upstream.place}"
            self._place_of[name] = upstream, model["id"]
            shown.append({**model, "id": name})
        return 200, shown, b""

    async def choose(self, body: bytes, key: str | None) -> tuple[Upstream, bytes]:
        """Whose model the request asks for, and the request as that server wants it. Without that name: the first's."""
        if len(self.all) == 1:
            return self.first, body
        try:
            request = msgspec.json.decode(body)
            name = str(request["model"])
        except (msgspec.DecodeError, RecursionError, KeyError, TypeError):
            return self.first, body
        if name not in self._place_of:
            await self.models(key)
        upstream, there = self._place_of.get(name, (self.first, name))
        return upstream, msgspec.json.encode({**request, "model": there})

    async def ready(self, key: str | None) -> tuple[int, str, bytes]:
        """A server's word that it can answer, else the first one's that it cannot."""
        found = await asyncio.gather(*(_ready(one, key) for one in self.all), return_exceptions=True)
        for one in found:
            if not isinstance(one, BaseException) and one[0] == 200:
                return one
        return _or_raise(found[0])

    async def close(self) -> None:
        await asyncio.gather(*(one.close() for one in self.all))


def _or_raise(found: Answer | BaseException) -> Answer:
    if isinstance(found, BaseException):
        raise found
    return found


async def _ready(upstream: Upstream, key: str | None) -> tuple[int, str, bytes]:
    """From /health/ready, which is ours; elsewhere the list of models is the sign of life."""
    status, kind, body = await upstream.ask("GET", "/health/ready", key=key)
    if status in (200, 503) and "json" in kind:
        return status, kind, body
    status, _, body = await upstream.models(key)
    return status, "application/json", body if status != 200 else b'{"status": "ready"}'

"""What stands in front of every route: Host, Origin, API key, and the count of running requests. Pure ASGI.

Everything needs a key, if there are keys, but the pages and the paths listed here. They give away nothing about anybody's requests.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastqwen.errors import FastqwenError
from fastqwen.server.http.door import Door
from fastqwen.server.http.errors import describe, error_body, error_response
from fastqwen.server.http.pages import is_page, policy_of
from fastqwen.server.http.sse import DIRECT_SEND

OPEN_PATHS = frozenset({"/health", "/health/ready", "/ping", "/favicon.ico"})
COUNTED_PATHS = frozenset(
    {
        "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/v1/embeddings", "/v1/score",
        "/v1/rerank", "/v2/embed", "/classify", "/pooling", "/v1/chat/completions/batch", "/invocations",
    }
)  # fmt: skip
UNVERSIONED = frozenset(
    {
        *(path.removeprefix("/v1") for path in COUNTED_PATHS if path.startswith("/v1/")),
        "/models",
        "/messages/count_tokens",
    }
)
WITHOUT_VERSION = frozenset({"/classify", "/pooling"})  # as vLLM has them
LOCAL_HOSTS = frozenset({"localhost", "127.0.0.1", "::1", "[::1]"})
READING_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})  # these compute nothing
MAX_HEADERS = 128
ALLOWED_METHODS = "GET, HEAD, POST, OPTIONS"
USUAL_HEADERS = "authorization, content-type, x-api-key, x-explain-cache"
HEADER_NAMES = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~, -]{1,4096}")
SECURITY_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
]


class Guard:
    def __init__(self, app: ASGIApp, state: Door) -> None:
        self._app = app
        self._state = state
        self._allowed_names = state.config.allowed_names
        # Digests have one length, so that comparing them takes one time, whatever was sent.
        self._keys = [hashlib.sha256(key.encode()).digest() for key in state.config.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await self._guarded(scope, receive, send)

    async def _guarded(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        path = routed(scope["path"], self._state.config.root_path)
        scope = {**scope, "path": path}
        origin = _header(headers, b"origin")
        allowed_origin = origin if self._state.config.allows_origin(origin) else None
        if scope["method"] == "HEAD":
            send = scope[DIRECT_SEND] = _without_body(send)
        scope.setdefault(DIRECT_SEND, send)
        send = _with_headers(send, path, allowed_origin)
        refusal = self._refusal(scope, headers, path)
        if refusal is not None:
            await error_response(*refusal, path)(scope, receive, send)
        elif scope["method"] == "OPTIONS" and allowed_origin is not None:
            await Response(status_code=204, headers=_preflight_headers(headers))(scope, receive, send)
        elif scope["method"] == "HEAD":
            await self._app({**scope, "method": "GET"}, receive, send)
        elif path in COUNTED_PATHS and scope["method"] == "POST":
            await self._counted(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _counted(self, scope: Scope, receive: Receive, send: Send) -> None:
        """A request is active from here until its last byte was sent, without a gap in between."""
        try:
            self._state.admit()
        except FastqwenError as error:
            await error_response(*describe(error), scope["path"])(scope, receive, send)
            return
        self._state.num_active += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._state.num_active -= 1

    def _refusal(
        self, scope: Scope, headers: list[tuple[bytes, bytes]], path: str
    ) -> tuple[int, dict[str, object]] | None:
        if len(headers) > MAX_HEADERS:
            many = f"the request has {len(headers)} headers, at most {MAX_HEADERS} are allowed"
            return 431, error_body(many, "invalid_request_error")
        num_hosts = sum(name == b"host" for name, _ in headers)
        if num_hosts > 1 or (num_hosts == 0 and scope.get("http_version") == "1.1"):
            return 400, error_body("the request needs exactly one Host header", "invalid_request_error")
        if num_hosts and not self._host_allowed(_header(headers, b"host")):
            unknown = "this server does not answer to that Host name; --allowed-hosts adds names"
            return 403, error_body(unknown, "invalid_request_error", None, "host_not_allowed")
        if scope["method"] not in READING_METHODS:
            problem = self._problem_of_page(headers)
            if problem is not None:
                return problem
        if self._keys and not _is_open(scope, headers, path) and not self._key_matches(headers):
            missing = "a valid API key is needed: send the header Authorization: Bearer KEY"
            return 401, error_body(missing, "authentication_error", None, "invalid_api_key")
        return None

    def _problem_of_page(self, headers: list[tuple[bytes, bytes]]) -> tuple[int, dict[str, object]] | None:
        """Any page that a user visits can have the browser send a request here, and needs no permission for plain text.

        Browsers say where a request comes from; what is no browser says nothing and may ask.
        """
        origin = _header(headers, b"origin")
        if not any(name == b"origin" for name, _ in headers) and _header(headers, b"sec-fetch-site") in (
            "",
            "same-origin",
            "none",
        ):
            return None
        if not self._is_own_page(origin, _header(headers, b"host")):
            foreign = f"the page at {origin[:200] or 'another site'} may not ask here; --allowed-origins adds it"
            return 403, error_body(foreign, "invalid_request_error", None, "origin_not_allowed")
        kind = _header(headers, b"content-type").partition(";")[0].strip().lower()
        if kind != "application/json" and not kind.endswith("+json"):
            plain = "a page's requests need the header Content-Type: application/json"
            return 415, error_body(plain, "invalid_request_error", None, "not_json")
        return None

    def _is_own_page(self, origin: str, host: str) -> bool:
        if self._state.config.allows_origin(origin):
            return True
        try:
            place = urlsplit(origin)
            return bool(place.netloc) and (place.netloc == host or place.hostname in self._allowed_names)
        except ValueError:
            return False

    def _host_allowed(self, host: str) -> bool:
        """On the loopback address only loopback names: a web page whose name was rebound to it is turned away. No browser
        reaches a Unix socket, and clients put anything into the header there."""
        own, allowed = self._state.config.host, self._allowed_names
        is_loopback = own in LOCAL_HOSTS and self._state.config.uds is None
        if "*" in allowed or (not is_loopback and not allowed):
            return True
        name = host.rsplit(":", 1)[0] if host.rpartition(":")[2].isdigit() else host
        return name.lower() in LOCAL_HOSTS or name.lower() in allowed or name == own

    def _key_matches(self, headers: list[tuple[bytes, bytes]]) -> bool:
        scheme, _, bearer = _header(headers, b"authorization").partition(" ")
        given = bearer.strip() if scheme.lower() == "bearer" else _header(headers, b"x-api-key")
        digest = hashlib.sha256(given.encode("utf-8", "surrogatepass")).digest()
        return any([hmac.compare_digest(digest, key) for key in self._keys])  # a list: all are compared, whatever fits


def routed(path: str, root: str = "") -> str:
    """A slash at the end means the same, and so does OpenAI's path without its version, or with it twice, or with two slashes
    where a base address ended in one. What needs no key is there under its own spelling alone. ``root`` is what a proxy may
    leave in front."""
    root = root.rstrip("/")
    if root and (path == root or path.startswith(f"{root}/")):
        path = path[len(root) :]
    path = path.rstrip("/") or "/"
    single = re.sub("/{2,}", "/", path)
    path = single if single.startswith("/v1/") else path
    if path in UNVERSIONED:
        return f"/v1{path}"
    if path.removeprefix("/v1") in WITHOUT_VERSION:
        return path.removeprefix("/v1")
    if path == "/v2/rerank":  # Cohere's, with the same fields
        return "/v1/rerank"
    return path.removeprefix("/v1") if path.startswith("/v1/v1/") else path


def _is_open(scope: Scope, headers: list[tuple[bytes, bytes]], path: str) -> bool:
    """By the exact path as it will be routed. A browser's preflight cannot hold a key."""
    if scope["method"] == "OPTIONS":
        return bool(_header(headers, b"access-control-request-method")) and not scope.get("root_path")
    if scope["method"] not in ("GET", "HEAD") or scope.get("root_path"):
        return False
    return path in OPEN_PATHS or is_page(path)


def _preflight_headers(headers: list[tuple[bytes, bytes]]) -> dict[str, str]:
    """SDKs add headers of their own to what they send, so whatever is asked for is allowed: they decide nothing here."""
    asked = _header(headers, b"access-control-request-headers")
    return {
        "access-control-allow-methods": ALLOWED_METHODS,
        "access-control-allow-headers": asked if HEADER_NAMES.fullmatch(asked) else USUAL_HEADERS,
        "access-control-max-age": "600",
    }


def _header(headers: Iterable[tuple[bytes, bytes]], name: bytes) -> str:
    return next((value.decode("latin-1") for key, value in headers if key == name), "")


def _without_body(send: Send) -> Send:
    async def send_head(message: Message) -> None:
        if message["type"] == "http.response.body":
            message = {**message, "body": b""}
        await send(message)

    return send_head


def _with_headers(send: Send, path: str, origin: str | None) -> Send:
    more = [*SECURITY_HEADERS]
    policy = policy_of(path)
    if policy is not None:
        more.append((b"content-security-policy", policy))
    if origin is not None:
        more += [(b"access-control-allow-origin", origin.encode("latin-1")), (b"vary", b"Origin")]

    async def send_more(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", []), *more]}
        await send(message)

    return send_more

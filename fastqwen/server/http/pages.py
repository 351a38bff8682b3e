"""The files of the pages, and what a browser may do with each of them. They are shown without a key: they know nothing."""

from __future__ import annotations

import hashlib
import mimetypes
from collections.abc import Callable
from pathlib import Path

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

STATIC = Path(__file__).parents[1] / "static"
STATIC_FOLDER = "/static/"
CHAT_FOLDER = "/chat/"
PIECE_BYTES = 64 * 2**10
PAGES = {"/": "index.html", "/admin": "admin.html", "/worker.js": "js/worker.js"}

CONTENT_SECURITY_POLICY = (
    b"default-src 'self'; script-src 'self'; style-src 'self'; style-src-attr 'unsafe-inline'; img-src 'self' data:; "
    b"font-src 'self'; connect-src 'self'; object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
# What an answer draws is shown in frames of no origin that reach nothing: no network, no storage, not the page around them.
_FRAME = (
    b"sandbox allow-scripts; default-src 'none'; img-src data: blob:; font-src data:; "
    b"base-uri 'none'; form-action 'none'; frame-ancestors 'self'; "
)
FRAME_POLICIES = {
    "/static/frame/preview.html": _FRAME
    + b"script-src 'unsafe-inline'; style-src 'unsafe-inline'",  # the answer's own scripts
    "/static/frame/diagram.html": _FRAME
    + b"script-src 'self'; style-src 'self' 'unsafe-inline'",  # Mermaid, and none of the answer's
}


def add_pages(app: FastAPI) -> None:
    def add(path: str, file: _File) -> None:
        async def page(request: Request) -> _Sent:
            return _Sent(file, request)

        app.add_api_route(path, page, methods=["GET", "HEAD"], include_in_schema=False)

    for path, name in PAGES.items():
        add(path, _File(STATIC / name))
    index = _File(STATIC / "index.html", lambda page: page.replace(b'"static/', b'"../static/'))

    @app.api_route(CHAT_FOLDER + "{conversation}", methods=["GET", "HEAD"], include_in_schema=False)
    async def chat(conversation: str, request: Request) -> _Sent:
        """The same page one folder deeper: conversations are kept in browsers, so no server knows which there are."""
        return _Sent(index, request)

    files = {path.relative_to(STATIC).as_posix(): _File(path) for path in STATIC.rglob("*") if path.is_file()}

    @app.api_route(STATIC_FOLDER + "{name:path}", methods=["GET", "HEAD"], include_in_schema=False)
    async def static(name: str, request: Request) -> _Sent:
        if name not in files:
            raise HTTPException(404)
        return _Sent(files[name], request)


class _File:
    """Kept in memory once it was asked for: reading it in a thread costs ten times the rest of a request, and anybody may ask."""

    def __init__(self, path: Path, change: Callable[[bytes], bytes] = lambda content: content) -> None:
        self._path = path
        self._change = change
        self._seen: tuple[float, int] | None = None
        self.media_type = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
        if self.media_type.startswith("text/"):
            self.media_type += "; charset=utf-8"
        self.content = b""
        self.etag = ""

    def look(self) -> None:
        """Read it, if it is not what it was."""
        found = self._path.stat()
        if self._seen != (found.st_mtime, found.st_size):
            self.content = self._change(self._path.read_bytes())
            self.etag = f'"{hashlib.sha256(self.content).hexdigest()[:32]}"'
            self._seen = (found.st_mtime, found.st_size)


class _Sent(Response):
    """A file, or 304 to whoever has it. In pieces, so that of a file that nobody reads not all is in a connection's buffer."""

    def __init__(self, file: _File, request: Request) -> None:
        file.look()
        self.body = file.content
        headers = {"etag": file.etag, "content-type": file.media_type, "cache-control": "no-cache"}
        asked = request.headers.get("if-none-match", "")
        self.is_known = file.etag in (one.strip().removeprefix("W/") for one in asked.split(","))
        if not self.is_known:
            headers["content-length"] = str(len(self.body))
        self.status_code = 304 if self.is_known else 200
        self.background = None
        self.init_headers(headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        size = 0 if self.is_known else len(self.body)
        for start in range(0, size, PIECE_BYTES):
            body = self.body[start : start + PIECE_BYTES]
            await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def is_page(path: str) -> bool:
    """By the exact path as it will be routed."""
    if path.startswith(CHAT_FOLDER):
        return "/" not in path.removeprefix(CHAT_FOLDER)
    return path in PAGES or (path.startswith(STATIC_FOLDER) and ".." not in path)


def policy_of(path: str) -> bytes | None:
    """The Content-Security-Policy of a page or file; None for what is no page."""
    return FRAME_POLICIES.get(path, CONTENT_SECURITY_POLICY) if is_page(path) else None

"""The files of the pages, and what a browser may do with each of them. They are shown without a key: they know nothing."""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import FileResponse, HTMLResponse
from fastapi.staticfiles import StaticFiles

STATIC = Path(__file__).parents[1] / "static"
STATIC_FOLDER = "/static/"
CHAT_FOLDER = "/chat/"
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
    def add(path: str, name: str) -> None:
        async def page() -> FileResponse:
            return FileResponse(STATIC / name)

        app.add_api_route(path, page, methods=["GET", "HEAD"], include_in_schema=False)

    for path, name in PAGES.items():
        add(path, name)

    @app.api_route(CHAT_FOLDER + "{conversation}", methods=["GET", "HEAD"], include_in_schema=False)
    async def chat(conversation: str) -> HTMLResponse:
        """The same page one folder deeper: conversations are kept in browsers, so no server knows which there are."""
        page = (STATIC / "index.html").read_text(encoding="utf-8")
        return HTMLResponse(page.replace('"static/', '"../static/'))

    app.mount("/static", StaticFiles(directory=STATIC), name="static")


def is_page(path: str) -> bool:
    """By the exact path as it will be routed."""
    if path.startswith(CHAT_FOLDER):
        return "/" not in path.removeprefix(CHAT_FOLDER)
    return path in PAGES or (path.startswith(STATIC_FOLDER) and ".." not in path)


def policy_of(path: str) -> bytes | None:
    """The Content-Security-Policy of a page or file; None for what is no page."""
    return FRAME_POLICIES.get(path, CONTENT_SECURITY_POLICY) if is_page(path) else None

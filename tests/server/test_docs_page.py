"""/docs works without a network, names every route and field, and runs nothing."""

from __future__ import annotations

import re
from html.parser import HTMLParser

from fastapi import FastAPI

from fastqwen.server.dialects.schema import ChatRequest
from fastqwen.server.http.docs_page import page
from tests.server.live import LiveServer


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))


def test_every_route_and_field_is_there_and_nothing_comes_from_elsewhere(server: LiveServer):
    response = server.http.get("/docs")
    assert response.headers["content-type"].startswith("text/html")
    schema = server.http.get("/openapi.json").json()
    for path, operations in schema["paths"].items():
        for method in operations:
            assert f"<h2>{method.upper()} {path}</h2>" in response.text
    for field in ChatRequest.model_fields:
        assert f"<td>{field}<td>" in response.text
    assert "number from 0 to 100" in response.text
    tags = Tags()
    tags.feed(response.text)
    assert {tag for tag, _ in tags.seen} & {"script", "img", "link", "iframe"} == set()
    links = [value for _, attributes in tags.seen for key, value in attributes.items() if key in ("href", "src")]
    assert links == ["openapi.json"]


def test_text_is_escaped():
    app = FastAPI(title="<b>", description="a & b")
    assert not re.search(r"<b>", page(app.openapi()))

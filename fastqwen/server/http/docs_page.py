"""GET /docs: the routes and their fields as one plain page, made from the OpenAPI description, with nothing from elsewhere."""

from __future__ import annotations

import functools
import json
from html import escape
from typing import Any

from fastapi import FastAPI
from fastapi.responses import HTMLResponse, Response

STYLE = """
:root { color-scheme: light dark }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
h2 { margin: 2.2rem 0 .3rem; font: 600 1.05rem ui-monospace, monospace }
table { border-collapse: collapse; width: 100% }
td, th { text-align: left; vertical-align: top; padding: .2rem 1rem .2rem 0; border-bottom: 1px solid #8884 }
td:first-child, pre { font-family: ui-monospace, monospace }
"""
EXAMPLE = """curl {origin}/v1/chat/completions -H "Content-Type: application/json" \\
  -d '{{"messages": [{{"role": "user", "content": "Hello"}}]}}'"""


def add_route(app: FastAPI) -> None:
    @functools.cache
    def written() -> tuple[bytes, bytes]:
        """Once: anybody may ask for them, as often as they like."""
        document = app.openapi()
        return page(document).encode(), json.dumps(document, ensure_ascii=False).encode()

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(written()[0])

    @app.get("/openapi.json", include_in_schema=False)
    async def openapi_json() -> Response:
        return Response(written()[1], media_type="application/json")


def page(schema: dict[str, Any]) -> str:
    parts = []
    for path, operations in schema["paths"].items():
        parts += [_operation(method, path, operation) for method, operation in operations.items()]
    info = schema["info"]
    example = EXAMPLE.format(origin="http://localhost:8000")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(info["title"])} API</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body>'
        f"<h1>{escape(info['title'])} {escape(info['version'])}</h1><p>{escape(info.get('description', ''))}. "
        'For programs: <a href="openapi.json">openapi.json</a>. A field that is not listed has no effect and is named in '
        f"the answer's <code>warnings</code>; a value out of range is refused with an error that names it.</p>"
        f"<pre>{escape(example)}</pre>"
        f"{''.join(parts)}</body></html>\n"
    )


def _operation(method: str, path: str, operation: dict[str, Any]) -> str:
    text = operation.get("description") or ""
    content = operation.get("requestBody", {}).get("content", {})
    body = content.get("application/json", {}).get("schema", {})
    required = set(body.get("required", ()))
    rows = [_row(name, field, name in required) for name, field in body.get("properties", {}).items()]
    table = f"<table><tr><th>field<th>value<th>default</tr>{''.join(rows)}</table>" if rows else ""
    return f"<h2>{escape(method.upper())} {escape(path)}</h2><p>{escape(text)}</p>{table}"


def _row(name: str, field: dict[str, Any], required: bool) -> str:
    default = "required" if required else _default(field.get("default"))
    about = field.get("description", "")
    value = escape(_kind(field)) + (f"<br>{escape(about)}" if about else "")
    return f"<tr><td>{escape(name)}<td>{value}<td>{escape(default)}</tr>"


def _default(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "" if value in (None, "") else str(value)


def _kind(field: dict[str, Any]) -> str:
    """A type with its limits, in words: number from 0 to 2, list of texts."""
    if "anyOf" in field:
        return " or ".join(dict.fromkeys(_kind(one) for one in field["anyOf"] if one.get("type") != "null"))
    if "enum" in field or "const" in field:
        return " or ".join(f'"{one}"' for one in field.get("enum", [field.get("const")]))
    kind = {"string": "text", "integer": "whole number", "array": "list"}.get(
        field.get("type", ""), field.get("type", "any")
    )
    if kind == "list" and "items" in field:
        kind = f"list of {_kind(field['items'])}"
    limits = [
        f"{word} {field[key]:g}"
        for key, word in (
            ("minimum", "from"),
            ("exclusiveMinimum", "above"),
            ("maximum", "to"),
            ("exclusiveMaximum", "below"),
            ("minItems", "at least"),
            ("maxItems", "at most"),
            ("maxLength", "characters up to"),
        )
        if key in field
    ]
    return " ".join([str(kind), *limits])

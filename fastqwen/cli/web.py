"""fastqwen web"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fastqwen.cli.options import with_options
from fastqwen.server.config import ServerConfig, WebConfig

BOUNDS = (
    "max_body_bytes",
    "max_concurrent_requests",
    "header_timeout_s",
    "body_timeout_s",
    "stall_timeout_s",
    "drain_timeout_s",
)


@with_options(front_options=WebConfig, hidden=BOUNDS)
def web(
    front_options: dict[str, Any],
    api: Annotated[
        list[str],
        typer.Option(
            metavar="URL", help="An OpenAI-compatible server, like http://localhost:8000/v1; several may be given."
        ),
    ],
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            help="Key of the server behind; it is never sent to a browser. With several --api one for each, in order, "
            "none for a server without. Better: the variable FASTQWEN_API_KEY."
        ),
    ] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="File with these keys, one per line.")] = None,
    page_key: Annotated[
        list[str] | None,
        typer.Option(
            help="Key that visitors must enter; several may be given. Better: the variable FASTQWEN_PAGE_KEY."
        ),
    ] = None,
    page_key_file: Annotated[Path | None, typer.Option(help="File with one such key per line.")] = None,
) -> None:
    """Show the chat page for any OpenAI-compatible server: vLLM, llama.cpp, FastChat, or this one elsewhere.

    fastqwen web --api http://localhost:8000/v1
    fastqwen web --api http://gpu1:8000 --api http://gpu2:8000 --port 9000
    """
    from fastqwen.server.http.exposure import read_keys
    from fastqwen.server.web.app import serve_page
    from fastqwen.server.web.upstream import Upstreams

    config = WebConfig(**front_options, api_keys=read_keys(page_key, page_key_file, WebConfig))
    keys = read_keys(api_key, api_key_file, ServerConfig)
    raise typer.Exit(serve_page(config, Upstreams(api, keys, page_has_keys=bool(config.api_keys))))

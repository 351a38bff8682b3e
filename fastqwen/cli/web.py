"""fastqwen web"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fastqwen.cli.cluster import TokenFile
from fastqwen.cli.options import with_options
from fastqwen.cluster.config import PageConfig
from fastqwen.errors import BadConfig
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
        list[str] | None,
        typer.Option(
            metavar="URL", help="An OpenAI-compatible server, like http://localhost:8000/v1; several may be given."
        ),
    ] = None,
    controller: Annotated[
        str | None, typer.Option(help="HOST:PORT of a cluster's controller, in the place of --api: all of its models.")
    ] = None,
    token_file: TokenFile = None,
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
    fastqwen web --controller 192.0.2.1:21001
    """
    if bool(api) == bool(controller):
        raise BadConfig("give either --api URL, once or more, or --controller HOST:PORT")
    from fastqwen.server.http.exposure import read_keys
    from fastqwen.server.web.app import serve_page
    from fastqwen.server.web.upstream import Upstreams

    config = WebConfig(**front_options, api_keys=read_keys(page_key, page_key_file, WebConfig))
    if controller:
        from fastqwen.cluster.front import serve_front

        if api_key or api_key_file:
            raise BadConfig("--api-key is for servers that --api names: a cluster is entered with its token")
        raise typer.Exit(serve_front(PageConfig(**front_options, api_keys=config.api_keys), controller, token_file))
    keys = read_keys(api_key, api_key_file, ServerConfig)
    raise typer.Exit(serve_page(config, Upstreams(api or [], keys, page_has_keys=bool(config.api_keys))))

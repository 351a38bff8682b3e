"""fastqwen web"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def web(
    api: Annotated[
        list[str],
        typer.Option(
            metavar="URL", help="An OpenAI-compatible server, like http://localhost:8000/v1; several may be given."
        ),
    ],
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any free port.")] = 8008,
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
    insecure: Annotated[bool, typer.Option("--insecure", help="Let other machines in without a page key.")] = False,
    allowed_hosts: Annotated[
        list[str] | None, typer.Option(help="Host names that requests may use; * allows all. Default: local ones.")
    ] = None,
    allowed_origins: Annotated[
        list[str] | None, typer.Option(help="Other web origins whose pages may ask through this one. Default: none.")
    ] = None,
    access_log: Annotated[bool, typer.Option(help="Log a line for each request.")] = False,
    log_format: Annotated[str, typer.Option(help="text or json.")] = "text",
) -> None:
    """Show the chat page for any OpenAI-compatible server: vLLM, llama.cpp, FastChat, or this one elsewhere.

    fastqwen web --api http://localhost:8000/v1
    fastqwen web --api http://gpu1:8000 --api http://gpu2:8000 --port 9000
    """
    from fastqwen.errors import BadConfig
    from fastqwen.server.config import ServerConfig
    from fastqwen.server.http.exposure import read_keys
    from fastqwen.server.web.app import PAGE_KEY_FLAG, PAGE_KEY_VARIABLE, serve_page
    from fastqwen.server.web.upstream import Upstreams

    if log_format not in ("text", "json"):
        raise BadConfig(f"--log-format is {log_format!r}: use text or json")
    config = ServerConfig(
        host=host,
        port=port,
        api_keys=read_keys(page_key or [], page_key_file, variable=PAGE_KEY_VARIABLE, flag=PAGE_KEY_FLAG),
        allowed_hosts=tuple(name.lower() for name in allowed_hosts or []),
        allowed_origins=tuple(allowed_origins or []),
        insecure=insecure,
        access_log=access_log,
        log_format=log_format,
    )
    keys = read_keys(api_key or [], api_key_file, min_chars=1)
    raise typer.Exit(serve_page(config, Upstreams(api, keys, page_has_keys=bool(config.api_keys))))

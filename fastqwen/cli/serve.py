"""fastqwen serve"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fastqwen.cli.options import Model, with_options
from fastqwen.config import EngineConfig
from fastqwen.server.config import ServerConfig


@with_options(server_options=ServerConfig, engine_options=EngineConfig)
def serve(
    server_options: dict[str, Any],
    engine_options: dict[str, Any],
    model: Model,
    api_key: Annotated[
        list[str] | None,
        typer.Option(help="Key that requests must send; several may be given. Better: the variable FASTQWEN_API_KEY."),
    ] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="File with one key per line.")] = None,
) -> None:
    """Serve MODEL over an OpenAI-compatible API.

    fastqwen serve demo
    fastqwen serve Qwen/Qwen3-0.6B --port 8001 --max-model-len 8K
    """
    from fastqwen.server.http.exposure import read_keys
    from fastqwen.server.run import serve as run

    keys = read_keys(api_key, api_key_file, ServerConfig)
    raise typer.Exit(run(EngineConfig(model=model, **engine_options), ServerConfig(**server_options, api_keys=keys)))

"""fastqwen serve"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from fastqwen.cli.options import with_engine_options

MODEL_HELP = "demo, a folder, a .gguf file, or a hub name like Qwen/Qwen3-0.6B."


@with_engine_options
def serve(
    engine: dict[str, Any],
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any free port.")] = 8000,
    max_concurrent_requests: Annotated[
        int, typer.Option(min=1, help="Requests that may run or wait; more are answered with 429.")
    ] = 1024,
    drain_timeout: Annotated[
        float, typer.Option(min=0, help="Seconds that running requests get to finish after Ctrl-C or SIGTERM.")
    ] = 60.0,
    strict_model_name: Annotated[bool, typer.Option(help="Answer 404 to requests that name another model.")] = False,
    access_log: Annotated[bool, typer.Option(help="Log a line for each request.")] = True,
) -> None:
    """Serve MODEL over an OpenAI-compatible API.

    fastqwen serve demo
    fastqwen serve Qwen/Qwen3-0.6B --port 8001 --max-model-len 8K
    """
    from fastqwen.config import EngineConfig
    from fastqwen.server.run import serve as run
    from fastqwen.server.state import ServerConfig

    config = ServerConfig(
        host=host,
        port=port,
        max_concurrent_requests=max_concurrent_requests,
        drain_timeout_s=drain_timeout,
        strict_model_name=strict_model_name,
        access_log=access_log,
    )
    raise typer.Exit(run(EngineConfig(model=model, **engine), config))

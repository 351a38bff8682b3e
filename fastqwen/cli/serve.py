"""fastqwen serve"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fastqwen.cli.options import whole_number, with_engine_options
from fastqwen.records import (
    MAX_GRAMMAR_CHARS,
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_N,
    MAX_STOP_CHARS,
    MAX_STOP_STRINGS,
)

MODEL_HELP = "demo, a folder, a .gguf file, or a hub name like Qwen/Qwen3-0.6B."


@with_engine_options
def serve(
    engine: dict[str, Any],
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any free port.")] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option(help="Key that requests must send; several may be given. Better: the variable FASTQWEN_API_KEY."),
    ] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="File with one key per line.")] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Let other machines in without a key.")] = False,
    allowed_hosts: Annotated[
        list[str] | None, typer.Option(help="Host names that requests may use; * allows all. Default: local ones.")
    ] = None,
    allowed_origins: Annotated[
        list[str] | None, typer.Option(help="Web origins whose pages may call the API; * allows all. Default: none.")
    ] = None,
    max_body_bytes: Annotated[
        int, typer.Option(parser=whole_number, metavar="NUMBER", help="Largest request body.")
    ] = 32 * 2**20,
    max_concurrent_requests: Annotated[
        int, typer.Option(min=1, help="Requests that may run or wait; more are answered with 429.")
    ] = 1024,
    max_n: Annotated[int, typer.Option(min=1, max=MAX_N, help="Most answers to one prompt.")] = MAX_N,
    max_logprobs: Annotated[
        int, typer.Option(min=0, max=MAX_LOGPROBS, help="Most alternatives for each token.")
    ] = MAX_LOGPROBS,
    max_logit_bias: Annotated[
        int, typer.Option(min=0, max=MAX_LOGIT_BIAS, help="Most entries of logit_bias.")
    ] = MAX_LOGIT_BIAS,
    max_stop_strings: Annotated[
        int, typer.Option(min=0, max=MAX_STOP_STRINGS, help="Most stop strings.")
    ] = MAX_STOP_STRINGS,
    max_stop_chars: Annotated[
        int, typer.Option(min=1, max=MAX_STOP_CHARS, help="Longest stop string.")
    ] = MAX_STOP_CHARS,
    max_grammar_chars: Annotated[
        int, typer.Option(min=1, max=MAX_GRAMMAR_CHARS, help="Longest schema, regex or grammar of a request.")
    ] = MAX_GRAMMAR_CHARS,
    text_timeout: Annotated[
        float, typer.Option(min=0.1, help="Seconds for rendering and tokenising a prompt, or compiling a grammar.")
    ] = 2.0,
    header_timeout: Annotated[float, typer.Option(min=0.1, help="Seconds for a request's headers to arrive.")] = 10.0,
    body_timeout: Annotated[float, typer.Option(min=0.1, help="Seconds for a request's body to arrive.")] = 30.0,
    stall_timeout: Annotated[
        float, typer.Option(min=0.1, help="Seconds after which a stream that its client does not read is aborted.")
    ] = 60.0,
    drain_timeout: Annotated[
        float, typer.Option(min=0, help="Seconds that running requests get to finish after Ctrl-C or SIGTERM.")
    ] = 60.0,
    strict_model_name: Annotated[bool, typer.Option(help="Answer 404 to requests that name another model.")] = False,
    access_log: Annotated[bool, typer.Option(help="Log a line for each request.")] = True,
    log_format: Annotated[str, typer.Option(help="text or json.")] = "text",
) -> None:
    """Serve MODEL over an OpenAI-compatible API.

    fastqwen serve demo
    fastqwen serve Qwen/Qwen3-0.6B --port 8001 --max-model-len 8K
    """
    from fastqwen.config import EngineConfig
    from fastqwen.errors import BadConfig
    from fastqwen.server.config import ServerConfig
    from fastqwen.server.http.exposure import read_keys
    from fastqwen.server.request_limits import RequestLimits
    from fastqwen.server.run import serve as run

    if log_format not in ("text", "json"):
        raise BadConfig(f"--log-format is {log_format!r}: use text or json")
    config = ServerConfig(
        host=host,
        port=port,
        api_keys=read_keys(api_key or [], api_key_file),
        allowed_hosts=tuple(name.lower() for name in allowed_hosts or []),
        allowed_origins=tuple(allowed_origins or []),
        insecure=insecure,
        max_body_bytes=max_body_bytes,
        max_concurrent_requests=max_concurrent_requests,
        limits=RequestLimits(
            max_n=max_n,
            max_logprobs=max_logprobs,
            max_logit_bias=max_logit_bias,
            max_stop_strings=max_stop_strings,
            max_stop_chars=max_stop_chars,
            max_grammar_chars=max_grammar_chars,
        ),
        text_timeout_s=text_timeout,
        header_timeout_s=header_timeout,
        body_timeout_s=body_timeout,
        stall_timeout_s=stall_timeout,
        drain_timeout_s=drain_timeout,
        strict_model_name=strict_model_name,
        access_log=access_log,
        log_format=log_format,
    )
    raise typer.Exit(run(EngineConfig(model=model, **engine), config))

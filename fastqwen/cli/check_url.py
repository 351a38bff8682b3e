"""fastqwen check URL: does a server, ours or another, keep what OpenAI's API promises?"""

from __future__ import annotations


def check_server(url: str, api_key: str | None = None, as_json: bool = False) -> int:
    """Prints a table (or JSON) of checks; 0 if all passed. Raises FastqwenError if there is no server."""
    from fastqwen.terminal.conformance import run

    return run(url, api_key=api_key, as_json=as_json)

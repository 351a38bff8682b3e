"""An MCP server for the tests, over stdin and stdout: adds numbers, says a variable of its environment, fails, ends."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

SCHEMA = {"type": "object", "properties": {"a": {"type": "number"}, "b": {"type": "number"}}}
TOOLS = [{"name": name, "description": f"{name} it", "inputSchema": SCHEMA} for name in ("add", "env", "fail", "end")]


def said(text: str, *, is_error: bool = False) -> dict[str, Any]:
    return {"content": [{"type": "text", "text": text}, {"type": "image", "data": ""}], "isError": is_error}


def call(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    if name == "add":
        return said(str(arguments["a"] + arguments["b"]))
    if name == "env":
        return said(os.environ.get("MCP_TEST", ""))
    if name == "end":
        sys.exit(1)
    return said("it is broken", is_error=True)


def main() -> None:
    for line in sys.stdin:
        message = json.loads(line)
        if "id" not in message:
            continue
        print(json.dumps({"jsonrpc": "2.0", "id": 7, "method": "ping"}), flush=True)  # servers may ask, too
        results = {
            "initialize": lambda _: {"protocolVersion": "2025-03-26", "capabilities": {"tools": {}}},
            "tools/list": lambda _: {"tools": TOOLS},
            "tools/call": lambda params: call(params["name"], params["arguments"]),
        }
        if message.get("method") in results:
            result = results[message["method"]](message["params"])
            print(json.dumps({"jsonrpc": "2.0", "id": message["id"], "result": result}), flush=True)


if __name__ == "__main__":
    main()

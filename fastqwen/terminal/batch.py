"""A file of requests through a server, this machine's own or another: resumable, in any order, each answered once."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import uuid
from pathlib import Path
from typing import IO, Any

import httpx
from tqdm import tqdm

from fastqwen.client.own_server import own_server
from fastqwen.client.remote import is_address
from fastqwen.config import EngineConfig
from fastqwen.errors import BadConfig

PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings")
RETRY_STATUSES = (408, 429, 503)
MAX_TRIES = 8
REQUEST_TIMEOUT_S = 24 * 3600.0  # a long answer in a long queue


def run(
    source: Path, output: Path, model: str, engine_options: dict[str, Any], *, concurrency: int, api_key: str | None
) -> int:
    """0 if every request was answered with 200, 1 otherwise. Raises FastqwenError for files that cannot be used."""
    requests = read_requests(source)
    done = _drop_half_line(output)
    left = [one for one in requests if one["custom_id"] not in done]
    if not left:
        print(f"all {len(requests)} requests are answered in {output}", file=sys.stderr)
        return 0
    if is_address(model):
        failed = asyncio.run(_answer_all(left, output, model.rstrip("/"), concurrency, api_key))
    else:
        with own_server(EngineConfig(model=model, **engine_options)) as url:
            failed = asyncio.run(_answer_all(left, output, url, concurrency, None))
    print(f"{len(left) - failed} answered, {failed} failed, {len(done)} were there already: {output}", file=sys.stderr)
    return 1 if failed else 0


def read_requests(source: Path) -> list[dict[str, Any]]:
    """Each line is {"custom_id", "method", "url", "body"}. Raises BadConfig that names the line."""
    try:
        lines = source.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadConfig(f"cannot read {source}: {error}") from None
    found: list[dict[str, Any]] = []
    seen: set[str] = set()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            request = json.loads(line)
        except ValueError as error:
            raise BadConfig(f"{source}, line {number}: not JSON: {error}") from None
        name = request.get("custom_id") if isinstance(request, dict) else None
        if not isinstance(name, str) or request.get("url") not in PATHS or not isinstance(request.get("body"), dict):
            raise BadConfig(f"{source}, line {number}: needs custom_id, body, and url, one of {', '.join(PATHS)}")
        if name in seen:
            raise BadConfig(f"{source}, line {number}: custom_id {name!r} was used before")
        seen.add(name)
        found.append(request)
    return found


def _drop_half_line(output: Path) -> set[str]:
    """The requests that have an answer. A line that a kill cut in half is taken off."""
    if not output.exists():
        return set()
    data = output.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    done: set[str] = set()
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            done.add(json.loads(line)["custom_id"])
        except (ValueError, KeyError, TypeError):
            raise BadConfig(f"{output}, line {number} is no answer of a batch: choose another file with -o") from None
    if whole != data:
        with output.open("r+b") as file:
            file.truncate(len(whole))
    return done


async def _answer_all(
    requests: list[dict[str, Any]], output: Path, url: str, concurrency: int, api_key: str | None
) -> int:
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    waiting = iter(requests)
    failed = 0
    with (
        output.open("a", encoding="utf-8") as file,
        tqdm(total=len(requests), unit="request", dynamic_ncols=True) as bar,
    ):
        async with httpx.AsyncClient(
            base_url=url, headers=headers, timeout=REQUEST_TIMEOUT_S, limits=httpx.Limits(max_connections=concurrency)
        ) as client:

            async def work() -> None:
                nonlocal failed
                for request in waiting:
                    answer = await _answer(client, request)
                    failed += answer["response"] is None or answer["response"]["status_code"] != 200
                    _write(file, answer)
                    bar.update(1)

            await asyncio.gather(*(work() for _ in range(min(concurrency, len(requests)))))
    return failed


def _write(file: IO[str], answer: dict[str, Any]) -> None:
    file.write(json.dumps(answer, ensure_ascii=False) + "\n")
    file.flush()
    os.fsync(file.fileno())


def whole(request: dict[str, Any]) -> dict[str, Any]:
    """The body of a request, whose answer is to come in one piece."""
    body: dict[str, Any] = request["body"]
    return {**body, "stream": False} if body.get("stream") else body


async def _answer(client: httpx.AsyncClient, request: dict[str, Any]) -> dict[str, Any]:
    """One line of output. A server that is busy or restarting is asked again; any other answer counts."""
    result: dict[str, Any] = {
        "id": f"batch_req_{uuid.uuid4().hex}",
        "custom_id": request["custom_id"],
        "response": None,
        "error": None,
    }
    for attempt in range(MAX_TRIES):
        try:
            response = await client.post(request["url"], json=whole(request))
        except httpx.HTTPError as error:
            result["error"] = {"code": "connection_error", "message": str(error) or type(error).__name__}
        else:
            result["error"] = None
            result["response"] = {
                "status_code": response.status_code,
                "request_id": response.headers.get("x-request-id", ""),
                "body": _json(response),
            }
            if response.status_code not in RETRY_STATUSES:
                break
        await asyncio.sleep(min(30.0, 0.5 * 2**attempt))
    return result


def _json(response: httpx.Response) -> Any:
    try:
        return response.json()
    except ValueError:
        return {"error": {"message": response.text[:1000]}}

"""A file of requests through a server, this machine's own or another: resumable, in any order, each answered once."""

from __future__ import annotations

import asyncio
import codecs
import json
import os
import sys
import uuid
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Line:
    """One line of the source: a request, or what is wrong with it. ``name`` is its custom_id, or its number."""

    name: str
    request: dict[str, Any] | None
    problem: str = ""


def run(
    source: Path, output: Path, model: str, engine_options: dict[str, Any], *, concurrency: int, api_key: str | None
) -> int:
    """0 if every request was answered with 200, 1 otherwise. Raises FastqwenError for files that cannot be used."""
    lines = read_requests(source)
    done = _drop_half_line(output)
    left = [one for one in lines if one.name not in done]
    wrong = [one for one in left if one.request is None]
    requests = [one.request for one in left if one.request is not None]
    with output.open("a", encoding="utf-8") as file:
        for one in wrong:
            _write(file, _failed(one.name, "invalid_request", one.problem))
    if not left:
        print(f"all {len(lines)} requests are answered in {output}", file=sys.stderr)
        return 0
    failed = len(wrong)
    if requests and is_address(model):
        failed += asyncio.run(_answer_all(requests, output, model.rstrip("/"), concurrency, api_key))
    elif requests:
        with own_server(EngineConfig(model=model, **engine_options)) as url:
            failed += asyncio.run(_answer_all(requests, output, url, concurrency, None))
    print(f"{len(left) - failed} answered, {failed} failed, {len(done)} were there already: {output}", file=sys.stderr)
    return 1 if failed else 0


def read_requests(source: Path) -> list[Line]:
    """Each line is {"custom_id", "method", "url", "body"}. One that is wrong costs no other. Raises BadConfig for a file that
    cannot be read, or in which no line is right."""
    try:
        data = source.read_bytes().removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise BadConfig(f"cannot read {source}: {error.strerror}") from None
    found: list[Line] = []
    seen: set[str] = set()
    # Only line feeds end a line: JSON texts may hold what else Python takes for an end.
    for number, line in enumerate(data.split(b"\n"), start=1):
        if line.strip():
            found.append(_parsed(line, number, seen))
            seen.add(found[-1].name)
    if found and all(one.request is None for one in found):
        raise BadConfig(f"{source} holds no request: {found[0].problem}")
    return found


def _parsed(line: bytes, number: int, seen: set[str]) -> Line:
    unnamed = f"line {number}"
    try:
        request = json.loads(line.decode("utf-8"), parse_constant=_refuse_constant)
        # Half of a surrogate pair and 1e999 can be written as JSON, but not sent as UTF-8 and a number.
        json.dumps(request, ensure_ascii=False, allow_nan=False).encode(
            "utf-8"
        )  # half of a surrogate pair can be written, but not sent
    except (ValueError, RecursionError) as error:
        return Line(unnamed, None, f"line {number} is not JSON in UTF-8: {str(error)[:200] or type(error).__name__}")
    name = request.get("custom_id") if isinstance(request, dict) else None
    if not isinstance(name, str) or not name:
        return Line(unnamed, None, f"line {number} has no custom_id")
    if name in seen:
        return Line(f"{unnamed}: {name}", None, f"line {number}: custom_id {name!r} was used before")
    if request.get("url") not in PATHS or not isinstance(request.get("body"), dict):
        return Line(name, None, f"line {number} needs body, an object, and url, one of {', '.join(PATHS)}")
    if request.get("method", "POST") != "POST":
        return Line(name, None, f"line {number}: method is {request['method']!r}, but must be POST")
    return Line(name, request)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _drop_half_line(output: Path) -> set[str]:
    """The requests that have an answer. A line that a kill cut in half is taken off."""
    if not output.exists():
        return set()
    data = output.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    done: set[str] = set()
    for number, line in enumerate(whole.split(b"\n")[:-1], start=1):
        try:
            done.add(json.loads(line)["custom_id"])
        except (ValueError, KeyError, TypeError, RecursionError):
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
    try:
        text = json.dumps(answer, ensure_ascii=False)
        text.encode("utf-8")
    except UnicodeEncodeError:  # half of a surrogate pair, in an answer of another server
        text = json.dumps(answer)
    file.write(text + "\n")
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
        except (httpx.HTTPError, OSError) as error:
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


def _failed(name: str, code: str, message: str) -> dict[str, Any]:
    error = {"code": code, "message": message}
    return {"id": f"batch_req_{uuid.uuid4().hex}", "custom_id": name, "response": None, "error": error}


def _json(response: httpx.Response) -> Any:
    try:
        return response.json()
    except (ValueError, RecursionError):
        return {"error": {"message": response.text[:1000]}}

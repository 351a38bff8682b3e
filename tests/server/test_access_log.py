"""One line for each request, with its id, its duration and its tokens."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from typing import Any

import httpx
import pytest

from fastqwen import logs
from fastqwen.server.app import create_app
from fastqwen.server.http.access_log import AccessLog, request_id_of
from tests.server.harness import make_state
from tests.server.live import LiveServer

COMPLETION = "/v1/completions"


def ask(*requests: tuple[str, str, dict[str, Any]], writes: bool = True) -> list[httpx.Response]:
    """Each is a method, a path, and what httpx takes."""

    async def run() -> list[httpx.Response]:
        state = make_state(lambda prompt, seed: "abcd")
        engine: Any = state.engine
        running = asyncio.create_task(engine.run())
        transport = httpx.ASGITransport(app=AccessLog(create_app(state), writes=writes), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            found = [await client.request(method, path, **options) for method, path, options in requests]
        running.cancel()
        return found

    return asyncio.run(run())


def access_lines(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [one for one in caplog.records if one.name == "fastqwen.access"]


@pytest.fixture(autouse=True)
def written(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "fastqwen.access")


@pytest.mark.parametrize("stream", [False, True])
def test_a_line_says_duration_tokens_and_id(caplog: pytest.LogCaptureFixture, stream: bool):
    body = {"prompt": "abc", "max_tokens": 4, "stream": stream}
    [response] = ask(("POST", COMPLETION, {"json": body, "headers": {"X-Request-Id": "mine-1"}}))
    assert response.headers["x-request-id"] == "mine-1"
    [record] = access_lines(caplog)
    text = logs.TextFormatter().format(record)
    assert re.search(rf'"POST {COMPLETION} HTTP/1.1" 200 OK, \d+\.\d+ s, 3 \+ 4 tokens, id mine-1$', text)
    entry = json.loads(logs.JsonFormatter().format(record))
    wanted = {"method": "POST", "path": COMPLETION, "status": 200, "request_id": "mine-1"}
    assert wanted.items() <= entry.items()
    assert (entry["prompt_tokens"], entry["completion_tokens"]) == (3, 4) and entry["duration_s"] >= 0


def test_every_answer_has_an_id_also_a_refusal(caplog: pytest.LogCaptureFixture):
    answers = ask(
        ("GET", "/v1/models", {}),
        ("POST", COMPLETION, {"json": {"prompt": 5}}),
        ("GET", "/v1/models", {"headers": {"Host": "evil.example"}}),
        ("GET", "/nowhere?x=%0a", {}),
    )
    assert [one.status_code for one in answers] == [200, 400, 403, 404]
    ids = [one.headers["x-request-id"] for one in answers]
    assert len(set(ids)) == 4
    records = access_lines(caplog)
    assert [one.fields["request_id"] for one in records] == ids  # type: ignore[attr-defined]
    assert "400 Bad Request" in records[1].getMessage() and "tokens" not in records[1].getMessage()
    assert "/nowhere?... " in records[3].getMessage(), "some clients put their key into the query"


@pytest.mark.parametrize("given", [b"", b"a b", b"a\nb", b"x" * 129, "é".encode(), b'"'])
def test_an_id_that_a_log_cannot_hold_is_replaced(given: bytes):
    assert re.fullmatch(r"[0-9a-f]{32}", request_id_of([(b"x-request-id", given)]))
    assert request_id_of([(b"x-request-id", b"9d2f-11:ab/cd=")]) == "9d2f-11:ab/cd="


def test_probes_and_scrapes_get_a_line_where_their_answer_changes(caplog: pytest.LogCaptureFixture):
    polled = [("GET", path, {}) for path in ("/health", "/metrics", "/health/ready", "/health/")] * 3
    strange = ("GET", "/health", {"headers": {"Host": "evil.example"}})
    answers = ask(*polled, strange, strange, polled[0], ("GET", "/v1/models", {}), ("GET", "/v1/models", {}))
    assert all(one.headers["x-request-id"] for one in answers)
    lines = [(one.fields["path"], one.fields["status"]) for one in access_lines(caplog)]  # type: ignore[attr-defined]
    ready = answers[2].status_code
    assert lines == [
        ("/health", 200), ("/metrics", 200), ("/health/ready", ready), ("/health", 403), ("/health", 200),
        ("/v1/models", 200), ("/v1/models", 200),
    ]  # fmt: skip


def test_without_the_log_there_are_ids_and_no_lines(caplog: pytest.LogCaptureFixture):
    [response] = ask(("GET", "/v1/models", {}), writes=False)
    assert response.headers["x-request-id"] and access_lines(caplog) == []


def test_a_served_request_is_found_by_its_id(server: LiveServer):
    body = {"prompt": "One, two,", "max_tokens": 3}
    answer = server.http.post(COMPLETION, json=body, headers={"X-Request-Id": "found-again"})
    usage = answer.json()["usage"]
    [line] = [line for line in server.log.splitlines() if line.endswith("id found-again")]
    assert f"{usage['prompt_tokens']} + {usage['completion_tokens']} tokens" in line

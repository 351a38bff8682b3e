"""The load generator against a real server, and against answers that no server should give."""

from __future__ import annotations

import asyncio
import json

import pytest

from fastqwen.benchmark.http_load import Target, closed_loop
from fastqwen.errors import FastqwenError
from tests.server.live import LiveServer, one_line, run


def test_against_a_running_server(server: LiveServer):
    words = ["--concurrency", "1", "--concurrency", "6", "--num-requests", "6", "--input-len", "9", "--output-len", "3"]
    done = run("bench", "serve", server.url, *words)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert [(one["concurrency"], one["requests"], one["errors"]) for one in found["results"]] == [(1, 6, 0), (6, 6, 0)]
    for one in found["results"]:
        assert one["output_tokens_per_s"] == pytest.approx(18 / one["seconds"])
        assert 0 < one["ttft_p50_ms"] <= one["ttft_p99_ms"]


def test_a_refusal_is_told(server: LiveServer):
    line = one_line(run("bench", "serve", server.url, "--concurrency", "1", "--input-len", "9000"))
    assert "8192" in line


def test_nobody_answers():
    assert "127.0.0.1:1" in one_line(run("bench", "serve", "http://127.0.0.1:1"))


HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n"
TOKEN = b'data: {"choices":[{"text":"x"}]}\n\n'


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (HEAD + TOKEN + b"data: [DONE]\n\n", None),
        (HEAD + TOKEN, "broke off"),
        (HEAD + TOKEN + b'data: {"error":{"message":"engine lost"}}\n\n', "engine lost"),
        (HEAD + b"data: [DONE]\n\n", "without a token"),
        (b"HTTP/1.1 503 Busy\r\n\r\ntry later", "status 503: try later"),
        (b"", "before an answer came"),
        (b"nonsense\r\n\r\n", "Error"),
    ],
)
def test_broken_answers(answer: bytes, error: str | None):
    async def play() -> None:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(answer)
            writer.close()

        listening = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = listening.sockets[0].getsockname()[1]
        async with listening:
            streams = await closed_loop(Target(f"http://127.0.0.1:{port}/v1", {}), [b"{}"] * 3, 2)
        assert len(streams) == 3
        for stream in streams:
            assert stream.error is None if error is None else error in str(stream.error)

    asyncio.run(play())


def test_turns_of_conversations(server: LiveServer):
    """Each request has all in front of it in its prompt, answers included, and a start that all conversations share."""
    words = ["--concurrency", "2", "--num-requests", "6", "--turns", "3", "--system-len", "64", "--input-len", "20"]
    done = run("bench", "serve", server.url, *words, "--output-len", "6")
    assert done.returncode == 0, done.stderr
    [found] = json.loads(done.stdout.splitlines()[-1])["results"]
    assert (found["requests"], found["errors"]) == (6, 0)
    assert found["normalized_latency_p90_ms"] >= found["itl_p50_ms"] * 5 / 6
    asked = 2 * sum(64 + 20 * turn + 6 * (turn - 1) for turn in (1, 2, 3))
    # at least the system prompt of all but the first two, and of later turns what is in whole blocks of 16
    least = 2 * (64 + 80) + 2 * (80 - 64)
    assert least / asked <= found["prefix_hits"] < 1


def test_turns_need_the_answers_ids():
    events = HEAD + TOKEN + b'data: {"choices":[],"usage":{"completion_tokens":1}}\n\ndata: [DONE]\n\n'

    async def play() -> None:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(events)
            writer.close()

        listening = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with listening:
            target = Target(f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}", {})
            stream = await target.stream(b"{}", keeps_lines=True)
        with pytest.raises(FastqwenError, match="--turns"):
            _ = stream.token_ids

    asyncio.run(play())

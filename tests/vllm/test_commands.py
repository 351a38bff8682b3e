"""Commands under vLLM's names, against a running server."""

from __future__ import annotations

import json
from pathlib import Path

from tests.server.live import LiveServer, one_line, run


def test_run_batch(server: LiveServer, tmp_path: Path):
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}
    line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(json.dumps(line) + "\n")
    done = run("run-batch", "-i", str(source), "-o", str(output), "--model", server.url)
    assert done.returncode == 0, done.stderr
    [found] = [json.loads(one) for one in output.read_text().splitlines()]
    assert found["custom_id"] == "a" and found["response"]["status_code"] == 200


def test_complete(server: LiveServer):
    done = run("complete", "--url", f"{server.url}/v1", "-q", "One, two, three,", "--max-tokens", "4")
    assert done.returncode == 0 and done.stdout.strip(), done.stderr


def test_bench_serve(server: LiveServer):
    words = ["--base-url", server.url, "--model", "a-name-of-theirs", "--dataset-name", "random", "--num-prompts", "2"]
    done = run(
        "bench", "serve", *words, "--max-concurrency", "2", "--random-input-len", "9", "--random-output-len", "3"
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["results"][0]["requests"] == 2
    assert "--dataset-name" in one_line(run("bench", "serve", server.url, "--dataset-name", "sharegpt"))
    assert "--concurrency" in one_line(run("bench", "serve", server.url, "--request-rate", "4"))
    assert "--base-url" in one_line(run("bench", "serve"))

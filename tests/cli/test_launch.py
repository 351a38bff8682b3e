"""fastqwen launch: what an agent is told, and that nothing else is touched. A shell script stands for the agent."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import httpx
import pytest

from fastqwen.errors import FastqwenError
from fastqwen.terminal.agents import AGENTS, Place, launch
from tests.server.live import one_line, run

PLACE = Place("http://localhost:8000", "my-model", 40_960, "abcdefgh12")


class Models(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = json.dumps({"data": [{"id": "my-model", "max_model_len": 40_960}]}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Models)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("name", AGENTS)
def test_each_agent_is_told_address_model_and_key(name: str):
    settings = AGENTS[name].settings(PLACE)
    told = json.dumps([settings.arguments, settings.environment, settings.files])
    assert all(word in told for word in ("http://localhost:8000", "my-model", "abcdefgh12"))
    if name not in ("qwen-code",):
        assert "40960" in told or settings.environment["CLAUDE_CODE_MAX_OUTPUT_TOKENS"] == "20480"


def test_print_shows_the_settings_and_starts_nothing(url: str, capsys: pytest.CaptureFixture[str]):
    assert launch("aider", url, ["--yes"], api_key=None, only_print=True) == 0
    said = capsys.readouterr().out
    assert f"export OPENAI_API_BASE={url}/v1" in said and said.rstrip().endswith("--yes")


@pytest.mark.slow
def test_a_server_of_its_own_ends_with_the_agent(tmp_path: Path):
    program = tmp_path / "aider"
    program.write_text(
        '#!/bin/sh\necho "$OPENAI_API_BASE"\nkill -INT "$PPID"\nsleep 0.5\nexec curl -fs "$OPENAI_API_BASE/models"\n'
    )
    program.chmod(0o755)
    result = run("launch", "aider", "--model", "demo", PATH=f"{tmp_path}:{os.environ['PATH']}")
    address, models = result.stdout.split("\n", 1)
    assert result.returncode == 0 and json.loads(models)["data"][0]["id"] == "demo", result
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{address}/models")
    missing = one_line(run("launch", "aider", "--model", str(tmp_path / "missing"), "--print"))
    assert "missing" in missing


def test_the_agent_gets_settings_and_arguments_and_its_status_is_ours(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    program = tmp_path / "aider"
    program.write_text('#!/bin/sh\ncat "$4" > "$OUT"\necho "$OPENAI_API_BASE $5" >> "$OUT"\nexit 3\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    assert launch("aider", url, ["hello"], api_key=None, only_print=False) == 3
    said = (tmp_path / "out").read_text()
    assert '"max_input_tokens": 40960' in said and f"{url}/v1 hello" in said


def test_what_is_missing_is_said(url: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(FastqwenError, match="npm install -g @openai/codex"):
        launch("codex", url, [], api_key=None, only_print=False)
    with pytest.raises(FastqwenError, match="none of claude"):
        launch("emacs", url, [], api_key=None, only_print=True)

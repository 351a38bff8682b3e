"""Signals, kills and damaged files: what is running ends with a reason, and what can go on goes on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.live import (
    LiveServer,
    children,
    command,
    engines,
    environment,
    events,
    eventually,
    is_alive,
    one_line,
    run,
)

CHAT = "/v1/chat/completions"


def body(max_tokens: int = 40, **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "Tell me a long story about a lighthouse."}]
    return {"messages": messages, "max_tokens": max_tokens, "stream": True, "ignore_eos": True, **more}


class Reader(threading.Thread):
    """Reads one stream to its end, however it ends."""

    def __init__(self, server: LiveServer, max_tokens: int = 40) -> None:
        super().__init__(daemon=True)
        self.seen: list[str] = []
        self.broken = False
        self._url, self._body = server.url, body(max_tokens)
        self.start()
        eventually(lambda: len(self.seen) > 3, 20, "a running stream")

    def run(self) -> None:
        try:
            with httpx.stream("POST", self._url + CHAT, json=self._body, timeout=60) as response:
                for line in response.iter_lines():
                    self.seen += events([line])
        except httpx.HTTPError:
            self.broken = True

    def finish_reason(self) -> str:
        return json.loads(self.seen[-2])["choices"][0]["finish_reason"]


@pytest.fixture
def own_server(demo_gguf: Path) -> Iterator[LiveServer]:
    """A server that the test may end."""
    with LiveServer("demo") as server:
        yield server


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_lets_running_requests_finish(own_server: LiveServer, number: int):
    readers = [Reader(own_server) for _ in range(3)]
    engine = own_server.engine_pid()
    own_server.signal(number)
    time.sleep(0.2)
    try:
        refused = httpx.post(own_server.url + CHAT, json=body(), timeout=5)
        assert refused.status_code == 503
        assert "shutting down" in refused.json()["error"]["message"]
        assert own_server.http.get("/health/ready").status_code == 503
    except httpx.ConnectError:
        pass  # it had finished already
    assert own_server.process.wait(60) == 0
    for reader in readers:
        reader.join(5)
        assert reader.seen[-1] == "[DONE]"
        assert reader.finish_reason() == "length"
    assert not is_alive(engine)
    assert "Traceback" not in own_server.log


def test_the_second_signal_aborts(own_server: LiveServer):
    reader = Reader(own_server, max_tokens=4000)
    engine = own_server.engine_pid()
    own_server.signal(signal.SIGTERM)
    time.sleep(0.3)
    assert own_server.process.poll() is None
    own_server.signal(signal.SIGTERM)
    start_s = time.monotonic()
    own_server.process.wait(10)
    assert time.monotonic() - start_s < 6  # a drain would take as long as the answer
    reader.join(5)
    assert not reader.is_alive()
    assert reader.broken or "[DONE]" not in reader.seen, "a broken answer must not look like a whole one"
    assert not is_alive(engine)
    assert "Traceback" not in own_server.log


def test_an_idle_server_ends_at_once(own_server: LiveServer):
    own_server.signal(signal.SIGINT)
    start_s = time.monotonic()
    assert own_server.process.wait(10) == 0
    assert time.monotonic() - start_s < 6


def test_a_killed_engine_ends_streams_with_an_error_and_comes_back(own_server: LiveServer):
    readers = [Reader(own_server, max_tokens=4000) for _ in range(4)]
    first = own_server.engine_pid()
    os.kill(first, signal.SIGKILL)
    for reader in readers:
        reader.join(2)
        assert not reader.is_alive(), "a stream outlived its engine"
        assert not reader.broken
        assert "[DONE]" not in reader.seen
        assert json.loads(reader.seen[-1])["error"]["code"] == "engine_error"
    restarting = own_server.http.get("/health/ready")
    assert (restarting.status_code, restarting.json()["status"]) == (503, "restarting")
    refused = own_server.http.post(CHAT, json=body())
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
    assert own_server.http.get("/health").status_code == 200
    eventually(lambda: own_server.http.get("/health/ready").status_code == 200, 30, "recovery")
    answer = own_server.http.post(CHAT, json=body(4, stream=False)).json()
    assert answer["choices"][0]["finish_reason"] == "length"
    assert own_server.engine_pid() != first


def test_the_engine_ends_when_the_server_is_killed(own_server: LiveServer):
    Reader(own_server, max_tokens=4000)
    started = children(own_server.process.pid)
    engine = own_server.engine_pid()
    assert engine in started
    [address] = [one for one in Path(f"/proc/{engine}/cmdline").read_text().split("\0") if one.startswith("ipc://")]
    folder = Path(address.removeprefix("ipc://")).parent
    assert folder.is_dir()
    own_server.signal(signal.SIGKILL)
    eventually(lambda: not any(map(is_alive, started)), 5, "the end of every process that it had started")
    assert not folder.exists(), "the socket's directory is left"


def test_an_engine_that_ends_before_it_is_ready_ends_the_server(demo_gguf: Path):
    process = subprocess.Popen(
        command("serve", "demo", "--port", "0"), env=environment(), stderr=subprocess.PIPE, text=True
    )
    eventually(lambda: engines(process.pid), 30, "an engine process")
    os.kill(engines(process.pid)[0], signal.SIGKILL)  # before it has said a word
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 1
    assert "status -9" in errors.splitlines()[-1] and "memory" in errors
    assert "Traceback" not in errors


def test_a_taken_port_is_found_before_anything_is_loaded(demo_gguf: Path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        start_s = time.monotonic()
        line = one_line(run("serve", str(demo_gguf), "--port", str(port)))
        assert time.monotonic() - start_s < 10
        # A model that is not there at all would be found first, if the port were looked at later.
        assert one_line(run("serve", "demo", "--port", str(port))) == line
    assert f"port {port}" in line and "--port" in line


def test_a_folder_without_tokenizer(tmp_path: Path):
    from tests.models.tiny import make

    make(tmp_path, "Qwen3Config", head_dim=16)
    line = one_line(run("serve", str(tmp_path), "--port", "0"))
    assert "tokenizer.json" in line and "--tokenizer" in line


def tiny_folder(folder: Path, demo_gguf: Path) -> None:
    """A complete checkpoint: random weights, and the demo's tokenizer as tokenizer.json."""
    from fastqwen.text.gguf_tokenizer import tokenizer_from_gguf
    from fastqwen.weights.gguf_file import GgufFile
    from tests.models.tiny import make

    make(folder, "LlamaConfig", vocab_size=49152, num_hidden_layers=1)
    tokenizer_from_gguf(GgufFile(demo_gguf).metadata, "demo").save(str(folder / "tokenizer.json"))


@pytest.mark.parametrize("keep", [0, 7, 400, 0.5, 0.999])
def test_truncated_safetensors(tmp_path: Path, demo_gguf: Path, keep: float):
    tiny_folder(tmp_path, demo_gguf)
    file = tmp_path / "model.safetensors"
    size = file.stat().st_size
    os.truncate(file, int(keep * size) if isinstance(keep, float) else keep)
    assert str(file) in one_line(run("serve", str(tmp_path), "--port", "0"))


@pytest.mark.parametrize("keep", [0, 20, 5000, 0.5, 0.999])
def test_truncated_gguf(tmp_path: Path, demo_gguf: Path, keep: float):
    file = tmp_path / "model.gguf"
    shutil.copy(demo_gguf, file)
    os.truncate(file, int(keep * file.stat().st_size) if isinstance(keep, float) else keep)
    assert file.name in one_line(run("serve", str(file), "--port", "0"))
    if keep == 0.5:  # both ask the same reader
        assert file.name in one_line(run("generate", str(file), "Hello"))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["serve", "/nowhere/at/all"], "no folder /nowhere/at"),
        (["serve", "no/such-model"], "HF_HUB_OFFLINE"),
        (["serve", "demo", "--max-model-len", "9000"], "8192"),
        (["serve", "demo", "--kv-cache-memory-bytes", "100K"], "KV cache"),
        (["serve", "demo", "--block-size", "24"], "--block-size"),
        (["serve", "demo", "--chat-template", "nothing.jinja"], "--chat-template"),
        (["serve", "demo", "--device", "cuda"], "--device"),
        (["generate", "demo", " "], "prompt"),
    ],
)
def test_mistakes_on_the_command_line(demo_gguf: Path, arguments: list[str], says: str):
    port = ["--port", "0"] if arguments[0] == "serve" else []
    assert says in one_line(run(*arguments, *port, HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES=""))


def test_no_network_and_no_cache(tmp_path: Path):
    """pip is told to look nowhere, so that the demo cannot be fetched."""
    result = run("serve", "demo", "--port", "0", FASTQWEN_CACHE=str(tmp_path), PIP_NO_INDEX="1", PIP_FIND_LINKS="")
    line = result.stderr.splitlines()[-1]
    assert result.returncode == 1 and line.startswith("fastqwen: ") and "Traceback" not in result.stderr
    assert str(tmp_path) in line and "network" in line


def test_a_flag_that_does_not_exist_is_named():
    result = run("serve", "demo", "--max-modellen", "5")
    assert result.returncode == 2
    assert "--max-modellen" in result.stderr and "Traceback" not in result.stderr


def test_modules_in_the_users_folder_do_not_reach_the_engine(tmp_path: Path, demo_gguf: Path):
    """People start the server where their own random.py lies."""
    for name in ("random.py", "tokenize.py", "torch.py"):
        (tmp_path / name).write_text("raise SystemExit('the wrong module was imported')")
    script = "from fastqwen.cli.main import main; main()"
    result = subprocess.run(
        [command()[0], "-P", "-c", script, "serve", str(demo_gguf), "--port", "0", "--max-model-len", "9000"],
        env=environment(),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "8192" in one_line(result)

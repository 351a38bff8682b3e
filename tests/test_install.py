"""scripts/install: which build of torch it takes, from where, and what it says. pip is a fake that writes down what it is asked."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FAKE_PYTHON = """#!/bin/sh
if [ "$1 $2" = "-m venv" ]; then
    [ -z "$VENV_FAILS" ] || { echo "ensurepip is not available"; mkdir -p "$4/bin"; exit 1; }
    mkdir -p "$4/bin" && cp "$0" "$4/bin/python"
    exit
fi
if [ "$1" = -m ]; then
    echo "$@" >>"$PIP_LOG"
    case "$*" in
    *--index-url*) [ "$CPU_BUILD_FAILS" = 0 ] || echo "no such wheel"; exit "$CPU_BUILD_FAILS" ;;
    *--editable*) [ -z "$PIP_FAILS" ] || { echo "error: no compiler"; exit 1; } ;;
    esac
    exit 0
fi
case "$2" in *version_info*) [ -z "$IS_OLD" ]; exit ;; esac
exec "$REAL_PYTHON" $WITHOUT_PACKAGES "$@"
"""


class Index(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.server.asked.append(self.path)  # type: ignore[attr-defined]
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


class Room:
    """A checkout's scripts and a machine of one's choice."""

    def __init__(self, folder: Path, index_url: str) -> None:
        self._folder = folder
        (folder / "scripts").mkdir()
        shutil.copy(ROOT / "scripts" / "install", folder / "scripts")
        shutil.copy(ROOT / "constraints.txt", folder)
        self.log = folder / "pip.log"
        self.errors, self.fails = "", False
        self.env = {
            "PATH": f"{folder}:/usr/bin:/bin",
            "PYTHON": str(self._write("python", FAKE_PYTHON)),
            "REAL_PYTHON": sys.executable,
            "WITHOUT_PACKAGES": "-S",
            "VENV": "room",
            "PIP_LOG": str(self.log),
            "CPU_BUILD_FAILS": "0",
            "TORCH_CPU_INDEX": index_url,
        }
        self.have_gpu(False)

    def _write(self, name: str, text: str) -> Path:
        path = self._folder / name
        path.write_text(text)
        path.chmod(0o755)
        return path

    def have_gpu(self, there: bool) -> None:
        self._write("nvidia-smi", f"#!/bin/sh\nexit {0 if there else 9}\n")

    def install(self, *extras: str) -> tuple[str, list[str]]:
        """What was said, and what pip was asked for."""
        command = [str(self._folder / "scripts" / "install"), *extras]
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=30)
        self.errors = done.stderr
        assert done.returncode == (1 if self.fails else 0), done
        return done.stdout, self.log.read_text().splitlines() if self.log.exists() else []


@pytest.fixture
def index() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Index)
    server.asked = []  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def room(tmp_path: Path, index: ThreadingHTTPServer) -> Room:
    return Room(tmp_path, f"http://127.0.0.1:{index.server_port}/cpu")


def test_without_a_gpu_the_cpu_build(room: Room, index: ThreadingHTTPServer):
    said, asked = room.install("dev")
    assert index.asked == ["/cpu/torch/"]  # type: ignore[attr-defined]
    assert "CPU build" in said and "0.25 GB" in said
    assert asked[0].endswith(f"--no-deps --index-url {room.env['TORCH_CPU_INDEX']} torch==2.13.0")
    assert asked[1].endswith("--constraint constraints.txt --editable .[dev]") and len(asked) == 2


def test_with_a_gpu_the_ordinary_build(room: Room, index: ThreadingHTTPServer):
    room.have_gpu(True)
    said, asked = room.install()
    assert index.asked == []  # type: ignore[attr-defined]
    assert "3 GB" in said and said.count("\n") == 1
    assert len(asked) == 1 and asked[0].endswith("--constraint constraints.txt --editable .")


def test_an_index_that_is_silent_is_left_out_after_three_seconds(room: Room):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        room.env["TORCH_CPU_INDEX"] = f"http://127.0.0.1:{silent.getsockname()[1]}"
        began_s = time.monotonic()
        said, asked = room.install()
    assert 2.9 < time.monotonic() - began_s < 10
    assert room.env["TORCH_CPU_INDEX"] in said and "3 GB" in said and said.count("\n") == 1
    assert len(asked) == 1 and "--index-url" not in asked[0]


def test_an_index_without_the_wheel_is_left_out(room: Room):
    room.env["CPU_BUILD_FAILS"] = "1"
    said, asked = room.install()
    assert "3 GB" in said.splitlines()[-1]
    assert len(asked) == 2 and "--index-url" not in asked[1]
    assert "no such wheel" in room.errors


def test_torch_that_is_there_is_left_alone(room: Room, index: ThreadingHTTPServer):
    room.env["WITHOUT_PACKAGES"] = ""
    said, asked = room.install("dev")
    assert said == "" and index.asked == []  # type: ignore[attr-defined]
    assert len(asked) == 1


def test_an_old_python_is_named_before_pip_is_asked(room: Room):
    room.env["IS_OLD"], room.fails = "1", True
    said, asked = room.install()
    assert (said, asked) == ("", [])
    assert "needs Python 3.11 or newer" in room.errors and "PYTHON=python3.12" in room.errors


def test_a_python_without_venv_leaves_nothing_half_made(room: Room, tmp_path: Path):
    room.env["VENV_FAILS"], room.fails = "1", True
    said, asked = room.install()
    assert (said, asked) == ("", []) and "apt install python3-venv" in room.errors
    assert not (tmp_path / "room").exists()


def test_what_pip_says_of_a_failure_is_shown(room: Room, tmp_path: Path):
    room.env["PIP_FAILS"], room.fails = "1", True
    room.install()
    assert "error: no compiler" in room.errors and "room/pip.log" in room.errors


def test_errors_under_make_say_what_make_is_told():
    command = [sys.executable, "-m", "fastqwen.cli.main", "serve"]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for words, said in (
            (["demo", "--port", port], "(make serve PORT=8001)"),
            (["demo", "--port", "0", "--block-size", "3"], "(make serve ARGS='--block-size ...')"),
            (["./missing"], "(make serve MODEL=...)"),
        ):
            done = subprocess.run(
                [*command, *words],
                env={**os.environ, "FASTQWEN_UNDER_MAKE": "1"},
                cwd=ROOT,
                capture_output=True,
                text=True,
            )
            assert done.returncode == 1 and done.stderr.endswith(f"{said}\n")

"""An engine whose server dies while the model is being loaded ends as well, at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil

from tests.server.live import ROOT, eventually

SERVER = """
import os, subprocess, sys
import zmq
from fastqwen.config import EngineConfig
from fastqwen.ipc import wire

address = "ipc://" + sys.argv[1]
socket = zmq.Context().socket(zmq.PAIR)
socket.bind(address)
engine = subprocess.Popen([sys.executable, "-c", sys.argv[2], address])
socket.send(wire.encode(wire.Start(config=EngineConfig(model="m"), path="m")))
assert isinstance(wire.from_engine.decode(socket.recv()), wire.Loading)
print(engine.pid, flush=True)
os._exit(1)
"""
ENGINE = """
import sys, time
from fastqwen.ipc.engine_main import main
from tests.client import fake_process

def slow(message, progress):
    progress(0, 1)
    time.sleep(1)
    return fake_process.start(message, progress)

main(sys.argv[1], "text", slow)
"""


def test_an_engine_ends_whose_server_died_while_it_loaded(tmp_path: Path):
    command = [sys.executable, "-c", SERVER, str(tmp_path / "engine"), ENGINE]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False, timeout=60)
    pid = int(done.stdout)
    eventually(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == "zombie", 20, "the engine's end")

"""A test run that a signal ends takes its servers along."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.server.live import ROOT, environment, eventually, is_alive

STORY = """
import os, subprocess, sys, time
from pathlib import Path
from tests.reliability.mock_model import make_model
from tests.reliability.server import serving

def test_it(tmp_path):
    apart = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"], start_new_session=True)
    with serving(make_model(tmp_path)) as server:
        pids = server.process.pid, server.engine.pid, apart.pid
        told = Path(os.environ["TOLD"])
        told.with_suffix(".part").write_text(" ".join(map(str, (*pids, os.environ["FASTQWEN_STATE"]))))
        told.with_suffix(".part").rename(told)
        time.sleep(1000)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_servers_end_when_a_signal_ends_the_run(tmp_path: Path, number: signal.Signals):
    story, told = tmp_path / "test_story.py", tmp_path / "told"
    story.write_text(STORY)
    command = [sys.executable, "-m", "pytest", "-p", "tests.conftest", "--basetemp", str(tmp_path / "run"), str(story)]
    run = subprocess.Popen(command, cwd=ROOT, env=environment(TOLD=str(told)), stdout=subprocess.DEVNULL)
    try:
        eventually(lambda: told.exists() or run.poll() is not None, 60, "a server of the other run")
        assert run.poll() is None
        *pids, state = told.read_text().split()
        assert len(pids) == 3 and all(is_alive(int(pid)) for pid in pids) and Path(state).is_dir()
        os.kill(run.pid, number)
        run.wait(10)
        eventually(lambda: not any(is_alive(int(pid)) for pid in pids), 5, "the end of its processes")
        eventually(lambda: not Path(state).exists(), 5, "the end of its folder")
    finally:
        run.kill()
        run.wait()

"""What is not Linux with an NVIDIA GPU: macOS has no /proc, Windows gets one line, a container has less than its machine."""

from __future__ import annotations

import builtins
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from fastqwen.cli.main import main
from fastqwen.plan import host
from fastqwen.plan.facts import GIB
from fastqwen.text.memory import limit_memory


def test_windows_is_pointed_to_wsl_in_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(SystemExit, match="1"):
        main()
    said = capsys.readouterr().err
    assert "wsl --install" in said and said.count("\n") == 1


def test_nothing_that_windows_lacks_is_imported_before_that_line():
    script = (
        "import sys\n"
        "for name in ('resource', 'fcntl', 'termios', 'pwd', 'grp', 'uvloop', 'readline'): sys.modules[name] = None\n"
        "from fastqwen.cli.main import main\n"
        "sys.platform = 'win32'\n"
        "main()\n"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert run.stderr.startswith("fastqwen: not for Windows itself: use WSL") and run.stderr.count("\n") == 1


def without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    real_open, real_read = builtins.open, Path.read_text

    def refusing_open(path, *arguments, **more):
        if str(path).startswith(("/proc", "/sys")):
            raise FileNotFoundError(path)
        return real_open(path, *arguments, **more)

    def refusing_read(path: Path, *arguments, **more) -> str:
        if str(path).startswith(("/proc", "/sys")):
            raise FileNotFoundError(path)
        return real_read(path, *arguments, **more)

    monkeypatch.setattr(builtins, "open", refusing_open)
    monkeypatch.setattr(Path, "read_text", refusing_read)


def test_without_proc_text_work_has_no_limit_on_memory_and_memory_is_still_known(monkeypatch: pytest.MonkeyPatch):
    limits: list[object] = []
    monkeypatch.setattr(resource, "setrlimit", lambda *limit: limits.append(limit))
    limit_memory(2**40)
    assert limits, "where there is /proc there is a limit"
    without_proc(monkeypatch)
    limits.clear()
    limit_memory(2**40)
    assert not limits
    facts = host.host_facts()
    assert 0 < facts.free_bytes <= facts.total_bytes


def test_a_limit_on_address_space_counts_as_well(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(resource, "getrlimit", lambda which: (GIB, GIB) if which == resource.RLIMIT_DATA else (-1, -1))
    assert host.host_facts().total_bytes <= GIB

"""A server of our own, for as long as a command needs one."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

from fastqwen.client.running import UNLISTED
from fastqwen.config import EngineConfig, flag
from fastqwen.errors import FastqwenError
from fastqwen.lifeline import PARENT_VARIABLE

READY_TIMEOUT_S = 1800.0
STOP_WITHIN_S = 20.0


@contextmanager
def own_server(config: EngineConfig) -> Iterator[str]:
    """The address of `fastqwen serve` on a free port of the loopback address, once it is ready. Raises what it says."""
    command = [sys.executable, "-P", "-m", "fastqwen.cli.main", "serve", config.model, "--port", "0", "--no-access-log"]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [*command, *_flags(config)],
            stdin=subprocess.DEVNULL,
            stderr=log,
            start_new_session=True,  # Ctrl-C is for whoever asks, and its end is ours to tell
            env={
                **os.environ,
                **{"FASTQWEN_API_KEY": "", "VLLM_API_KEY": "", UNLISTED: "1", PARENT_VARIABLE: str(os.getpid())},
            },
        )
        try:
            yield _wait_ready(process, log)
        finally:
            _show_warnings(log)
            process.terminate()
            try:
                process.wait(STOP_WITHIN_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_ready(process: subprocess.Popen[bytes], log: IO[bytes]) -> str:
    end_s = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < end_s:
        has_ended = process.poll() is not None  # asked first, so that its last words are read
        text = _text_of(log)
        if has_ended:
            lines = [line for line in text.splitlines() if line.startswith("fastqwen: ")]
            raise FastqwenError(
                lines[-1].removeprefix("fastqwen: ") if lines else f"the server did not start: {text[-500:]}"
            )
        if " API http://" in text:
            return text.split(" API ", 1)[1].split("/v1", 1)[0]
        time.sleep(0.1)
    raise FastqwenError(f"the server was not ready after {READY_TIMEOUT_S:.0f} s")


def _show_warnings(log: IO[bytes]) -> None:
    for line in _text_of(log).splitlines():
        if line.startswith(("WARNING", "ERROR")):
            print(line, file=sys.stderr)


def _text_of(log: IO[bytes]) -> str:
    log.seek(0)
    return log.read().decode(errors="replace")


def _flags(config: EngineConfig) -> list[str]:
    """The flags that say what this config says."""
    plain = EngineConfig(model=config.model)
    found: list[str] = []
    for name in config.__struct_fields__:
        value = getattr(config, name)
        if value == getattr(plain, name):
            continue
        if isinstance(value, bool):
            found.append(flag(name) if value else f"--no-{flag(name)[2:]}")
        else:
            for item in value if isinstance(value, list) else [value]:
                found += [flag(name), str(item)]
    return found

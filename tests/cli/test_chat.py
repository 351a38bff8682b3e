"""``fastqwen chat`` and ``generate`` as people use them: on a terminal, in a pipe, against a server."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.server.live import ROOT, LiveServer, command, environment, eventually, one_line, run

QUESTION = "What is the capital of France?"


class Terminal:
    """A program that believes it talks to a person."""

    def __init__(self, *arguments: str, **env: str) -> None:
        self._screen, theirs = pty.openpty()
        self.seen = ""
        self.process = subprocess.Popen(
            command(*arguments), stdin=theirs, stdout=theirs, stderr=theirs, env=environment(**{"TERM": "dumb", **env}), cwd=ROOT,
            start_new_session=True,
        )  # fmt: skip
        os.close(theirs)

    def wait_for(self, text: str, within_s: float = 60) -> None:
        start_s = time.monotonic()
        while text not in self.seen:
            assert time.monotonic() - start_s < within_s, f"{text!r} did not come: {self.seen!r}"
            if select.select([self._screen], [], [], 0.1)[0]:
                self.seen += os.read(self._screen, 65536).decode(errors="replace")

    def type(self, text: str) -> None:
        self.seen = ""
        os.write(self._screen, text.encode())


@contextmanager
def terminal(*arguments: str, **env: str) -> Iterator[Terminal]:
    found = Terminal(*arguments, **env)
    try:
        yield found
    finally:
        if found.process.poll() is None:
            found.process.kill()
        found.process.wait()


def test_a_conversation_with_a_server(server: LiveServer):
    with terminal("chat", server.url, "--temperature", "0", "--max-tokens", "60") as chat:
        chat.wait_for("> ")
        chat.type(f"{QUESTION}\n")
        chat.wait_for("Paris")
        chat.wait_for("\n> ")
        chat.type("/system Answer in one word.\n")
        chat.wait_for("System prompt: Answer in one word.")
        chat.type("/nonsense\n")
        chat.wait_for("/help lists them.\r\n> ")  # before the prompt is there, the terminal itself would swallow Ctrl-D
        chat.type("\x04")
        assert chat.process.wait(10) == 0


def test_ctrl_c_stops_the_answer_but_not_the_conversation(server: LiveServer):
    with terminal("chat", server.url, "--temperature", "0") as chat:
        chat.wait_for("> ")
        chat.type("Tell me a very long story about a lighthouse.\n")
        eventually(lambda: server.metric("num_requests_running") == 1, 10, "a running answer")
        time.sleep(0.5)
        os.kill(chat.process.pid, signal.SIGINT)
        chat.wait_for("[stopped]")
        eventually(server.is_idle, 3, "an abort")
        chat.type(f"/new\n{QUESTION}\n")
        chat.wait_for("Paris")
        chat.type("/exit\n")
        assert chat.process.wait(10) == 0


def test_pasted_lines_are_one_message_and_arrow_up_brings_it_back_next_time(server: LiveServer, tmp_path: Path):
    where = {"TERM": "xterm", "FASTQWEN_STATE": str(tmp_path)}
    words = ("chat", server.url, "--temperature", "0", "--max-tokens", "30")
    with terminal(*words, **where) as chat:
        chat.wait_for("> ")
        chat.type(f"\x1b[200~{QUESTION}\nAnswer\nin one sentence.\x1b[201~")
        chat.wait_for("in one sentence.")
        chat.type("\r")
        chat.wait_for("Paris")
        chat.wait_for("> ")
        chat.type("/exit\r")
        assert chat.process.wait(10) == 0
    with terminal(*words, **where) as chat:
        chat.wait_for("> ")
        chat.type("\x1b[A\x1b[A")
        chat.wait_for("in one sentence.")
        chat.type("\r")
        chat.wait_for("Paris")


def test_what_is_typed_while_an_answer_comes_waits_for_the_prompt(server: LiveServer):
    with terminal("chat", server.url, "--temperature", "0") as chat:
        chat.wait_for("> ")
        chat.type("Tell me a very long story about a lighthouse.\n")
        eventually(lambda: server.metric("num_requests_running") == 1, 10, "a running answer")
        chat.type("XYZZY")
        time.sleep(0.5)
        os.kill(chat.process.pid, signal.SIGINT)
        chat.wait_for("[stopped]")
        assert "XYZZY" not in chat.seen.split("[stopped]")[0]
        chat.wait_for("XYZZY")


def test_pipes(server: LiveServer):
    piped = run("chat", server.url, "--temperature", "0", stdin=QUESTION)
    assert piped.returncode == 0 and "Paris" in piped.stdout
    both = run("chat", server.url, "Answer this.", "--temperature", "0", "--max-tokens", "40", stdin=QUESTION)
    assert both.returncode == 0 and both.stdout.strip()
    alone = run("chat", server.url, QUESTION, "--temperature", "0")
    assert alone.stdout == "The capital of France is Paris.\n", "nothing but the answer goes to standard output"


def test_nobody_answers():
    assert "http://127.0.0.1:1" in one_line(run("chat", "http://127.0.0.1:1", "Hi"))


def test_generate(demo_gguf: Path, tmp_path: Path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"{QUESTION}\n\nSay hello.\n")
    words = ["--temperature", "0", "--max-tokens", "20", "--json"]
    done = run("generate", str(demo_gguf), "--file", str(prompts), *words)
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [one["prompt"] for one in answers] == [QUESTION, "Say hello."]
    assert answers[0]["text"] == "The capital of France is Paris." and answers[0]["finish_reason"] == "stop"
    raw = run("generate", str(demo_gguf), "--raw", "--temperature", "0", "--max-tokens", "5", stdin="One, two, three,")
    assert raw.returncode == 0 and "four" in raw.stdout


@pytest.mark.parametrize("words", [["--temperature", "-1"], ["--top-p", "0"]])
def test_wishes_out_of_range_are_one_line(demo_gguf: Path, words: list[str]):
    assert words[0].removeprefix("--").replace("-", "_") in one_line(run("generate", str(demo_gguf), "Hi", *words))

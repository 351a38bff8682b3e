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
ENDLESS = "List the first 1000 prime numbers.\n"  # the answer has more than 3000 tokens


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
        chat.type(ENDLESS)
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
        chat.type(ENDLESS)
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


def test_an_address_needs_no_http_in_front(server: LiveServer):
    address = server.url.removeprefix("http://")
    asked = run("chat", address, QUESTION, "--temperature", "0", "--json")
    assert asked.returncode == 0, asked.stderr
    assert json.loads(asked.stdout)["text"] == "The capital of France is Paris."
    assert "--dtype is for a model that is loaded here" in one_line(run("chat", address, "Hi", "--dtype", "float32"))


def test_chat_alone_finds_the_server_that_runs_here(float32_server: LiveServer, tmp_path: Path):
    note = tmp_path / "servers" / "1.json"
    note.parent.mkdir()
    wrong = {"pid": os.getpid(), "url": "http://127.0.0.1:1", "model": "gone", "started_s": 2.0, "wants_key": False}
    note.write_text(json.dumps({**wrong, "url": float32_server.url, "model": "demo", "started_s": 1.0}))
    note.with_name("2.json").write_text(json.dumps(wrong))
    note.with_name("3.json").write_text(json.dumps({**wrong, "pid": 2**22 - 1}))
    where = {"FASTQWEN_STATE": str(tmp_path)}
    found = run("chat", stdin=QUESTION, **where)
    assert found.returncode == 0 and found.stdout.strip()
    assert f"demo answers at {float32_server.url}" in found.stderr
    listed = run("ps", **where).stdout.splitlines()
    assert [line.split()[:3] for line in listed[1:]] == [
        ["http://127.0.0.1:1", "gone", "silent"],
        [float32_server.url, "demo", "ready"],
    ]
    assert not note.with_name("3.json").exists(), "the note of a process that is gone is removed"


def test_a_server_leaves_a_note_while_it_runs(float32_server: LiveServer):
    found = json.loads(run("ps", "--json").stdout.splitlines()[0])
    assert found == {"url": float32_server.url, "model": "demo", "pid": float32_server.process.pid, "state": "ready"}


def test_what_ollama_calls_run_is_chat(server: LiveServer):
    assert run("run", server.url, QUESTION, "--temperature", "0").stdout == "The capital of France is Paris.\n"


def test_an_answer_on_a_terminal_keeps_its_words_whole(server: LiveServer):
    with terminal("chat", server.url, "--temperature", "0", "--max-tokens", "60", TERM="xterm", COLUMNS="40") as chat:
        chat.wait_for("> ")
        chat.type("List the days of the week in one long sentence.\r")
        chat.wait_for("\n\x1b[?2004h> ")
        lines = chat.seen.replace("\r", "").replace("\x1b[?2004l", "").split("\n")[1:-1]
        assert len(lines) > 1 and all(len(line) < 40 for line in lines), lines


def test_generate_asks_a_server(server: LiveServer):
    words = ("--temperature", "0", "--max-tokens", "20", "--json")
    done = run("generate", server.url, QUESTION, "Say hello.", *words)
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [one["prompt"] for one in answers] == [QUESTION, "Say hello."]
    assert answers[0]["text"] == "The capital of France is Paris." and answers[0]["finish_reason"] == "stop"
    raw = run("generate", server.url, "--raw", "--temperature", "0", "--max-tokens", "5", stdin="One, two, three,")
    assert raw.returncode == 0 and "four" in raw.stdout


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

"""Every command and snippet of the README and of the pages in docs/ works as it is written.

A command that would download, or that runs until somebody stops it, is only read: its flags must exist.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from fastqwen.cli.main import app
from tests.server.live import ROOT, LiveServer, environment, run

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)
LOCAL = "http://localhost:8000"
SHORT = "localhost:8000"


def blocks(*languages: str) -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        for language, text in FENCE.findall(page.read_text(encoding="utf-8")):
            # docs/add_model.md shows parts of files; its own test compares them.
            if language in languages and page.name != "add_model.md":
                found.append((page.name, text))
    return found


def commands() -> list[str]:
    lines = [line.split("   #")[0].strip() for _, text in blocks("sh") for line in text.splitlines()]
    return [line for line in lines if line]


def elsewhere() -> list[str]:
    """What the README's last column says instead of other projects' commands: the last code of each row."""
    table = (ROOT / "README.md").read_text(encoding="utf-8").split("## What you typed elsewhere")[1].split("\n## ")[0]
    cells = [row.rsplit(" | ", 1)[1] for row in re.findall(r"^\| (.* \| .*) \|$", table, flags=re.M)[1:]]
    return [re.findall(r"`([^`]+)`", cell)[0] for cell in cells]


MAKE = [line for line in commands() if line.startswith("make ")]
CURL = [line for line in commands() if line.startswith("curl ")]
# What stands behind a curl line in docs/api.md is a part of its answer.
ANSWERS = {
    line.split("   # ")[0].strip(): line.split("   # ")[1].strip()
    for page, text in blocks("sh")
    for line in text.splitlines()
    if page == "api.md" and line.startswith("curl ")
}
FASTQWEN = [line for line in commands() if "fastqwen " in line and line not in MAKE]
ENDLESS = (
    "serve",
    "launch",
    "web",
    "bench",
    "controller",
    "worker",
    "node",
    "ranks",
    "api",
    "status",
    "up",
)  # and models and programs that are not here


def test_nothing_is_left_out():
    assert set(commands()) == {*MAKE, *CURL, *FASTQWEN}
    assert len(MAKE) > 3 and CURL and len(FASTQWEN) > 8 and len(blocks("python")) > 3


@pytest.mark.parametrize("line", MAKE)
def test_make_targets_exist(line: str):
    done = subprocess.run(["make", "-n", *shlex.split(line)[1:]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for word in shlex.split(line)[1:]:
        if "=" in word:
            assert word.partition("=")[2] in done.stdout, f"{word} is not honoured"


@pytest.mark.parametrize("line", ANSWERS)
def test_curl_says_what_stands_behind_it(server: LiveServer, line: str):
    done = subprocess.run(
        ["curl", "--silent", *shlex.split(line.replace(LOCAL, server.url))[1:]], capture_output=True, text=True
    )
    assert ANSWERS[line] in done.stdout


@pytest.mark.parametrize("line", [line for line in CURL if line not in ANSWERS])
def test_curl(server: LiveServer, line: str):
    words = shlex.split(line.replace(LOCAL, server.url))
    done = subprocess.run([words[0], "--silent", "--fail", *words[1:]], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "The capital of France is Paris." in done.stdout
    shown = next(text for page, text in blocks("json") if page == "README.md")
    assert set(json.loads(shown.replace("{…}", "{}"))) <= set(json.loads(done.stdout))


@pytest.mark.parametrize("line", FASTQWEN)
def test_fastqwen(server: LiveServer, line: str):
    fed, _, command = line.rpartition(" | ")
    words = shlex.split(command.replace(LOCAL, server.url).replace(SHORT, server.url))
    assert words[0] == "fastqwen"
    if words[1] in ENDLESS:
        _read_only(words[1:])
        return
    stdin = " ".join(shlex.split(fed)[1:]) if fed.startswith("echo ") else ""
    done = run(*words[1:], stdin=stdin)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize("line", [line for line in elsewhere() if line.startswith("fastqwen ")])
def test_commands_for_those_who_come_from_elsewhere(line: str):
    _read_only(shlex.split(line)[1:])


def test_python_for_those_who_come_from_elsewhere(server: LiveServer):
    lines = [line for line in elsewhere() if not line.startswith("fastqwen ")]
    assert len(lines) == 3
    names: dict[str, Any] = {}
    for line in lines:
        line = line.replace("Qwen/Qwen-7B-Chat", server.url)
        exec(line.replace("history=None", "history=None, max_tokens=8"), names)
    names["model"].close()
    assert names["response"] and len(names["history"]) == 1


def test_what_the_readme_calls_missing_is_missing():
    missing = (ROOT / "README.md").read_text(encoding="utf-8").split("## What is missing")[1].split("\n## ")[0]
    assert "experts excepted: those are unpacked when loaded" in missing


def _read_only(words: list[str]) -> None:
    """Parse the flags and do nothing."""
    command: Any = typer.main.get_command(app)
    names = words[: 2 if words[0] == "bench" else 1]
    for name in names:
        command = command.commands[name]
    params = command.make_context(" ".join(names), words[len(names) :]).params
    needed = {
        "web": ("api", "controller"),
        "worker": ("model", "upstream"),
        "api": ("controller",),
        "status": ("controller",),
    }
    needed |= {"controller": ("port",), "up": ("file",), "node": ("controller",), "ranks": ("port",)}
    assert any(params[name] for name in needed.get(names[0], ("model",)))


@pytest.mark.parametrize(("page", "text"), blocks("python"))
def test_python(server: LiveServer, page: str, text: str, tmp_path: Path):
    script = tmp_path / "snippet.py"
    script.write_text(text.replace(LOCAL, server.url))
    done = subprocess.run(
        [sys.executable, str(script)], env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, f"{page}:\n{done.stderr}"
    assert done.stdout.strip()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_named_files_exist(page: Path):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (page.parent / target).exists(), target
    for named in re.findall(r"`((?:fastqwen|tests|docs|bench|scripts)/[\w./]+\.\w+)`", text):
        assert (ROOT / named).exists(), named


def test_the_tour_names_every_room():
    from tests.test_rooms import ORDER

    tour = (ROOT / "docs" / "tour.md").read_text(encoding="utf-8")
    for room in set(ORDER) - {"version", "paths", "build"}:
        assert re.search(rf"`{room}(/|\.py)`", tour), f"docs/tour.md does not name {room}"
    for named in re.findall(r"^ +(?:-> )?(\w+/[\w.]*)  ", tour, flags=re.M):
        assert (ROOT / "fastqwen" / named).exists(), named


def test_what_the_troubleshooting_page_quotes_is_what_the_code_says():
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "fastqwen").rglob("*.py"))
    source = re.sub(r'"\s*\n\s*f?"', "", source)
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    for row in re.findall(r"^\| (.*?) \|", page, flags=re.M)[2:]:
        for quoted in re.findall(r"`([^`]+)`", row):
            pieces = re.split(r"127\.0\.0\.1|8000|…", quoted)
            assert all(piece.strip() in source for piece in pieces), quoted

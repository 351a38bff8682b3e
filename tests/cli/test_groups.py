"""Help in groups, words from elsewhere, and what a shell completes."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from fastqwen.cli.groups import ELSEWHERE
from fastqwen.cli.options import GROUPS
from fastqwen.config import EngineConfig, options_of
from fastqwen.server.config import ServerConfig
from fastqwen.version import __version__
from tests.server.live import one_line, run


def test_flags_stand_in_groups():
    lines = run("serve", "--help", COLUMNS="120").stdout.splitlines()
    titles = [line.removesuffix(":") for line in lines if line.endswith(":") and not line.startswith(" ")]
    assert titles[:2] == ["Arguments", "Options"] and set(titles[2:]) == set(GROUPS)
    assert sum(line.strip().startswith("--") for line in lines[lines.index("Options:") : lines.index("")]) < 15


def test_each_field_stands_in_one_group_at_most():
    fields = [name for names in GROUPS.values() for name in names]
    assert len(fields) == len(set(fields))
    ungrouped = set(options_of(EngineConfig)) - set(fields)
    assert ungrouped == set(), "every flag of the engine has a title"
    assert set(options_of(ServerConfig)) - set(fields) >= {"host", "port"}, "these stand first"


@pytest.mark.parametrize("word", ELSEWHERE)
def test_a_word_from_elsewhere_is_answered_with_ours(word: str):
    assert ELSEWHERE[word]


def test_unknown_commands_are_one_line():
    assert "fastqwen check MODEL" in one_line(run("show", "demo"))
    assert "did you mean serve?" in one_line(run("sevre", "demo"))
    assert "fastqwen --help" in one_line(run("xyzzy"))


def test_version():
    assert run("version").stdout == f"{__version__}\n" == run("--version").stdout


def test_list_shows_the_demo(demo_gguf):
    assert ["demo", "98", "MB"] in [line.split()[:3] for line in run("list").stdout.splitlines()]
    assert run("pull", "demo").stdout == f"{demo_gguf}\n"


TRIES = [
    (["fastqwen", "se"], ["serve"]),
    (["fastqwen", "serve", "--max-model"], ["--max-model-len"]),
    (["fastqwen", "serve", "de"], ["demo"]),
    (["fastqwen", "chat", "Qwen/Qwen3-32B-A"], ["Qwen/Qwen3-32B-AWQ"]),
    (["fastqwen", "serve", "demo", "--dtype", "b"], ["bfloat16"]),
    (["fastqwen", "bench", "lat"], ["latency"]),
    (["fastqwen", "bench", "latency", "--output"], ["--output-len"]),
    (["fastqwen", "completion", "f"], []),
]


def test_bash_completes():
    script = run("completion", "bash").stdout
    script += 't() { COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=(); _fastqwen; echo "${COMPREPLY[*]}"; }\n'
    script += "".join(f"t {' '.join(words)}\n" for words, _ in TRIES)
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert [line.split() for line in done.stdout.splitlines()] == [found for _, found in TRIES]
    assert done.stderr == ""


@pytest.mark.skipif(shutil.which("fish") is None, reason="fish is not installed")
def test_fish_completes():
    script = run("completion", "fish").stdout + "".join(f"complete -C '{' '.join(words)}'; echo;" for words, _ in TRIES)
    done = subprocess.run(["fish"], input=script, capture_output=True, text=True, check=True)
    for _, found in TRIES:
        assert all(one in done.stdout for one in found)


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_get_a_text_of_theirs(shell: str):
    text = run("completion", shell).stdout
    assert "--max-model-len" in text or "-l max-model-len" in text
    assert "Qwen/Qwen3-8B" in text

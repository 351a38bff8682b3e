"""docs/add_model.md: its snippets are parts of the files that they name, its commands work, and its promise holds."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastqwen import models
from fastqwen.model_config import ModelConfig
from tests.models.tiny import logits, make, prompt

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "add_model.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"^`([\w./]+)`\n```python\n(.*?)^```$", PAGE, flags=re.M | re.S)
COMMANDS = re.findall(r"^\$ (.*)$", PAGE, flags=re.M)


def test_all_snippets_were_found():
    assert len(SNIPPETS) == PAGE.count("```python\n") == 5
    assert len(COMMANDS) == PAGE.count("```console\n") == 2


@pytest.mark.parametrize(("path", "snippet"), SNIPPETS)
def test_snippets_are_parts_of_their_files(path: str, snippet: str):
    assert snippet in (ROOT / path).read_text(encoding="utf-8")


def test_the_first_snippet_is_the_whole_file():
    path, snippet = SNIPPETS[0]
    assert (ROOT / path).read_text(encoding="utf-8") == snippet


def test_the_switches_exist():
    named = re.findall(r"`(\w+)`", " ".join(line.split("|")[1] for line in PAGE.splitlines() if line.startswith("| `")))
    assert len(named) == 9 and set(named) <= set(ModelConfig.__struct_fields__)


def test_the_test_command_finds_the_cases():
    [command] = [one for one in COMMANDS if "pytest" in one]
    assert command.startswith("python -m pytest ")
    found = subprocess.run(
        [sys.executable, *command.split()[1:], "--collect-only"], capture_output=True, text=True, cwd=ROOT
    )
    assert found.returncode == 0, found.stdout
    assert "[qwen3-moe]" in found.stdout and "[qwen3-moe-mixed]" in found.stdout


def test_a_file_is_all_that_a_new_word_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The page's file under another word, from another folder: the same weights give the same logits."""
    make(tmp_path, "Qwen3MoeConfig", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, head_dim=16)
    expected = logits(tmp_path, prompt(20))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "qwen9-moe"}))
    folder = tmp_path / "models"
    folder.mkdir()
    (folder / "qwen9_moe.py").write_text(SNIPPETS[0][1])
    monkeypatch.setattr(models, "__path__", [*models.__path__, str(folder)])
    assert "qwen9_moe" in models.supported()
    assert torch.equal(logits(tmp_path, prompt(20)), expected)
    sys.modules.pop("fastqwen.models.qwen9_moe")

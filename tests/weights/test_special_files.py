"""Files that would never end, or change under the model: told in one line, in seconds."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fastqwen import LLM, SamplingParams
from fastqwen.cli.find_model import find_model
from fastqwen.config import EngineConfig
from fastqwen.errors import BadCheckpoint
from fastqwen.hub import find_checkpoint
from fastqwen.text.folder_templates import folder_templates
from fastqwen.text.folder_tokenizer import from_tokenizer_json, tokenizer_words
from fastqwen.text.memory import memory_limit
from fastqwen.text.template import ChatTemplate
from tests.models.tiny import make, prompt

LOOPS = ("{% for a in range(99999) %}" * 3) + "{% endfor %}" * 3


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make(tmp_path, "LlamaConfig", num_hidden_layers=1)
    return tmp_path


def devise(path: Path, kind: str) -> None:
    path.unlink(missing_ok=True)
    if kind == "a pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")


@pytest.mark.parametrize("kind", ["a pipe", "a device"])
@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "tokenizer.json", "generation_config.json", "chat_template.jinja", "x"]
)
def test_what_is_no_regular_file_is_told_and_not_read(folder: Path, name: str, kind: str):
    devise(folder / name, kind)
    for load in (lambda: find_checkpoint(EngineConfig(model=str(folder))), lambda: find_model(str(folder))):
        with pytest.raises(BadCheckpoint, match=f"{name} is {kind}, not a regular file"):
            load()


READERS = {
    "config.json": lambda folder: find_model(str(folder)),
    "tokenizer.json": lambda folder: from_tokenizer_json(folder, {}),
    "tokenizer_config.json": tokenizer_words,
    "chat_template.jinja": lambda folder: folder_templates(folder, {}),
}


@pytest.mark.parametrize("name", READERS)
def test_a_file_of_holes_is_told_of_and_not_read(folder: Path, name: str):
    """200 GB that take no place on the disk."""
    with (folder / name).open("w") as file:
        file.truncate(200 * 2**30)
    with memory_limit(2**31), pytest.raises(BadCheckpoint, match=f"{name} is larger than"):
        READERS[name](folder)


def test_a_template_without_an_end_is_given_up(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("fastqwen.text.template.READ_WITHIN_S", 0.2)
    with pytest.raises(BadCheckpoint, match="does not come to an end"):
        ChatTemplate(LOOPS, origin="x").render([{"role": "user", "content": "hi"}])
    assert ChatTemplate("{{ messages[0].content }}", origin="x").render([{"content": "hi"}]) == "hi"


def test_what_other_threads_compute_is_not_the_templates_time(monkeypatch: pytest.MonkeyPatch):
    """The timer of a process counts all of its threads."""
    monkeypatch.setattr("fastqwen.text.template.READ_WITHIN_S", 0.3)
    ended = threading.Event()
    data = bytes(2**20)

    def compute() -> None:
        while not ended.is_set():
            hashlib.sha256(data)  # lets go of Python's lock

    class Waits(list[Any]):
        def __iter__(self) -> Iterator[Any]:
            begun_s = time.process_time()
            while time.process_time() - begun_s < 0.5:
                time.sleep(0.01)
            return super().__iter__()

    other = threading.Thread(target=compute)
    other.start()
    try:
        template = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}", origin="x")
        assert template.render(Waits([{"content": "hi"}])) == "hi"
    finally:
        ended.set()
        other.join()


def test_an_end_that_is_lost_in_a_callback_comes_again(monkeypatch: pytest.MonkeyPatch):
    """Python prints what a finalizer raises, and goes on: the limit must not be spent with that."""
    monkeypatch.setattr("fastqwen.text.template.READ_WITHIN_S", 0.1)
    monkeypatch.setattr("sys.unraisablehook", lambda told: lost.append(told.exc_type))
    lost: list[type] = []

    class Slow:
        def __del__(self) -> None:
            while not lost and time.monotonic() < end_s:
                pass

    class Drops(list[Any]):
        def __iter__(self) -> Iterator[Any]:
            Slow()
            return super().__iter__()

    end_s = time.monotonic() + 20
    with pytest.raises(BadCheckpoint, match="does not come to an end"):
        ChatTemplate("{% for a in messages %}{% endfor %}" + LOOPS, origin="x").render(Drops())
    assert lost == [BadCheckpoint]


def overwrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(b"\7" * 100)


@pytest.mark.parametrize("act", [overwrite, lambda path: path.unlink(), lambda path: make_anew(path)])
def test_weights_that_change_under_the_model_end_it_and_others_do_not_matter(folder: Path, act):
    llm = LLM(str(folder), dtype="float32", skip_tokenizer_init=True)
    greedy = SamplingParams(temperature=0.0, max_tokens=8)
    before = llm.generate(prompt(10), greedy, use_tqdm=False)[0].outputs[0].token_ids
    time.sleep(0.02)  # a file system's clock ticks slowly
    act(folder / "model.safetensors")
    if act is overwrite:
        with pytest.raises(BadCheckpoint, match="was changed while it was in use"):
            llm.generate(prompt(10), greedy, use_tqdm=False)
    else:
        assert llm.generate(prompt(10), greedy, use_tqdm=False)[0].outputs[0].token_ids == before


def make_anew(path: Path) -> None:
    new = path.with_suffix(".new")
    new.write_bytes(os.urandom(path.stat().st_size))
    os.replace(new, path)

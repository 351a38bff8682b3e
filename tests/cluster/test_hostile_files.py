"""What a worker's files hold is read in a process that can be ended before the front end reads it itself."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from fastqwen.cluster import fleet
from fastqwen.text.load import load_text
from tests.cluster.test_fronts import TEXT, ask, scene, told, until
from tests.reliability.mock_model import make_model

LOOPS = ("{% for a in range(99999) %}" * 3) + "{% endfor %}" * 3


def test_a_worker_whose_template_does_not_end_keeps_nobody_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """In a thread of the front end nothing could end it, and models are made one after the other."""
    (tmp_path / "bad").mkdir()
    (tmp_path / "good").mkdir()
    bad, good = make_model(tmp_path / "bad"), make_model(tmp_path / "good")
    (bad / "chat_template.jinja").write_text(LOOPS)
    read_here: list[list[str]] = []

    def reading(path: Path, model: Any, config: Any) -> Any:
        read_here.append(config.served_model_name)
        if config.served_model_name == ["Bad"]:
            raise AssertionError("it would not come back")
        return load_text(path, model, config)

    monkeypatch.setattr(fleet, "load_text", reading)

    async def story() -> None:
        async with scene() as made, await made.client() as client:
            made.add_worker(bad, "a", name="Bad")
            await until(lambda: "a" in made.front.fleet.members)
            made.add_worker(good, "b", name="Good")
            await until(lambda: "a" in made.front.fleet.refused and "Good" in made.front.fleet.there)
            assert "does not come to an end" in made.front.fleet.refused["a"]
            answer = (await ask(client, model="Good")).json()
            assert answer["choices"][0]["message"]["content"] == TEXT
            assert "Bad" not in made.front.fleet.models and read_here == [["Good"]]
            assert len(processes()) == 1, "the text worker of the good one"

    told(story())


def processes() -> list[str]:
    """Children of this process that read text, whichever test started them and has not ended them."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            if (
                int(stat[1]) == os.getpid()
                and stat[0] != "Z"
                and "fastqwen.text.worker" in Path(f"/proc/{pid}/cmdline").read_text()
            ):
                found.append(pid)
        except OSError:
            continue
    return found


def test_files_that_cannot_be_read_here_leave_no_process_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The process that read them first has not failed at them."""

    def failing(path: Path, model: Any, config: Any) -> Any:
        raise fleet.FastqwenError("not here")

    monkeypatch.setattr(fleet, "load_text", failing)
    folder = make_model(tmp_path)

    async def story() -> None:
        async with scene() as made, await made.client():
            made.add_worker(folder, "a")
            await until(lambda: "a" in made.front.fleet.refused)
            assert made.front.fleet.refused["a"] == "not here"
            assert not processes()

    told(story())

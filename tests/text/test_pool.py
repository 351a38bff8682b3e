"""Hostile templates and grammars end in an error within their time, and the next prompt is read as if nothing was."""

from __future__ import annotations

import asyncio
import re
import time
from pathlib import Path

import psutil
import pytest

from fastqwen.config import EngineConfig
from fastqwen.errors import BadCheckpoint, BadRequest, ReadersGone
from fastqwen.text.pool import TextPool, WorkerGone
from fastqwen.text.worker import Compile, Encode, Render, TextJob
from fastqwen.weights.checkpoint import open_checkpoint
from tests.reliability.mock_model import make_model
from tests.text.hostile_templates import MARKER, TEMPLATES

HELLO = Encode("hello", False, 1000)
MESSAGES = [{"role": "user", "content": "hi"}]


def run(folder: Path, *jobs: TextJob, template: str | None = None, timeout_s: float = 0.5) -> list[list[int] | str]:
    """The ids of each job, or why it was refused."""

    async def work() -> list[list[int] | str]:
        others = set(psutil.Process().children(recursive=True))  # servers of other tests
        make_model(folder)
        model = open_checkpoint(folder, with_tensors=False).model
        pool = TextPool(
            EngineConfig(model="x", chat_template=template), folder, model, num_workers=1, timeout_s=timeout_s
        )
        found: list[list[int] | str] = []
        try:
            await pool.start()
            for job in jobs:
                start_s = time.monotonic()
                try:
                    found.append(await pool.run(job))
                except BadRequest as error:
                    found.append(str(error))
                assert time.monotonic() - start_s < 12.0
        finally:
            await pool.close()
        assert set(psutil.Process().children(recursive=True)) <= others
        return found

    return asyncio.run(work())


def test_text_becomes_ids(tmp_path: Path):
    assert run(tmp_path, HELLO, Render.of(MESSAGES, {"add_generation_prompt": True}, 1000))[0] == list(b"hello")


def test_hostile_templates_are_given_up_and_the_next_prompt_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """All of them in one template, each upon its own word; a worker that was killed is replaced."""
    monkeypatch.chdir(tmp_path)
    template = "".join(
        f"{{% if messages[0].content == 'attack {number}' %}}{source}{{% endif %}}"
        for number, source in enumerate(TEMPLATES)
        if "extends" not in source  # that may only stand at the beginning
    )
    jobs: list[TextJob] = []
    for number in range(len(TEMPLATES)):
        jobs += [Render.of([{"role": "user", "content": f"attack {number}"}], {}, 100_000), HELLO]
    found = run(tmp_path, *jobs, template=template)
    for number, (answer, after) in enumerate(zip(found[::2], found[1::2], strict=True)):
        shown = answer if isinstance(answer, str) else bytes(answer).decode()
        assert isinstance(answer, str) or set(re.findall(r"\w+", shown)) <= {"Undefined"}, (number, shown[:200])
        assert after == list(b"hello")
    assert len(found) // 2 >= 50
    assert not (tmp_path / MARKER).exists()


@pytest.mark.parametrize(
    "text", [" " * 900_000, "\t" * 900_000, "\u3000" * 900_000, "a" * 900_000, "^" * 900_000, "\n" * 900_000]
)
def test_long_runs_of_one_character_never_end_the_pool(tmp_path: Path, text: str):
    found = run(tmp_path, Encode(text, False, 10**6), HELLO, timeout_s=3.0)
    assert found[1] == list(b"hello")


GRAMMARS = ["", "start: /(/", "start: start", "start: a\na: b\nb: a", "%json {", 'start: %json {"type": 3}', "\x00"]


def test_bad_grammars_are_refused_with_a_reason(tmp_path: Path):
    found = run(tmp_path, *(Compile(grammar) for grammar in GRAMMARS), HELLO, timeout_s=2.0)
    assert all(isinstance(one, str) and one for one in found[:-1])
    assert found[-1] == list(b"hello")


def test_a_killed_worker_is_replaced(tmp_path: Path):
    async def work() -> None:
        others = set(psutil.Process().children())
        make_model(tmp_path)
        model = open_checkpoint(tmp_path, with_tensors=False).model
        pool = TextPool(EngineConfig(model="x"), tmp_path, model, num_workers=1)
        try:
            await pool.run(HELLO)
            [child] = set(psutil.Process().children()) - others
            child.kill()
            await asyncio.sleep(0.1)
            assert await pool.run(HELLO) == list(b"hello")
        finally:
            await pool.close()

    asyncio.run(work())


def test_a_template_that_hangs_while_it_is_read_is_told_at_the_start(tmp_path: Path):
    async def work() -> None:
        make_model(tmp_path)
        model = open_checkpoint(tmp_path, with_tensors=False).model
        endless = "{% for i in range(9999) %}{% for j in range(9999) %}{% for k in range(9999) %}{% endfor %}{% endfor %}{% endfor %}"
        pool = TextPool(EngineConfig(model="x", chat_template=endless), tmp_path, model, start_timeout_s=3.0)
        with pytest.raises(BadCheckpoint, match=r"does not come to an end|took too long"):
            await pool.start()
        await pool.close()

    asyncio.run(work())


def test_stopped_and_killed_workers_are_not_the_inputs_fault(tmp_path: Path):
    """Work under a worker that is stopped, or killed from outside, is done by another; where all are killed it is 503."""

    async def work() -> None:
        others = set(psutil.Process().children())
        make_model(tmp_path)
        model = open_checkpoint(tmp_path, with_tensors=False).model
        pool = TextPool(EngineConfig(model="x"), tmp_path, model, num_workers=1, timeout_s=0.5)
        try:
            await pool.start()
            for act in (psutil.Process.suspend, psutil.Process.kill):
                [child] = set(psutil.Process().children()) - others
                act(child)
                assert await pool.run(HELLO) == list(b"hello")

            async def suspended(self: object, data: bytes) -> None:
                for one in set(psutil.Process().children()) - others:
                    one.kill()
                raise WorkerGone

            monkeypatch = pytest.MonkeyPatch()
            monkeypatch.setattr("fastqwen.text.pool._Process.ask", suspended)
            with pytest.raises((ReadersGone, BadCheckpoint)) as found:
                await pool.run(HELLO)
            monkeypatch.undo()
            assert str(tmp_path) not in str(found.value)
            assert await pool.run(HELLO) == list(b"hello")
        finally:
            await pool.close()

    asyncio.run(work())


def test_heavy_work_leaves_a_worker_to_the_rest(tmp_path: Path):
    async def work() -> None:
        make_model(tmp_path)
        endless = "{% if messages[0].content|length > 70000 %}" + "{% for i in range(9999) %}" * 3
        endless += "{% endfor %}" * 3 + "{% endif %}{{ messages[0].content[:5] }}"
        model = open_checkpoint(tmp_path, with_tensors=False).model
        pool = TextPool(EngineConfig(model="x", chat_template=endless), tmp_path, model, timeout_s=1.0)
        try:
            await pool.start()
            long = Render.of([{"role": "user", "content": "x" * 80_000}], {}, 10**6)
            heavy = [asyncio.create_task(pool.run(long)) for _ in range(6)]
            await asyncio.sleep(0.1)
            for _ in range(5):
                assert await pool.run(HELLO) == list(b"hello")
            assert not any(one.done() for one in heavy[1:]), "what is quick did not wait for what is slow"
            found = await asyncio.gather(*heavy, return_exceptions=True)
            assert all(isinstance(one, BadRequest) for one in found)
        finally:
            await pool.close()

    asyncio.run(work())

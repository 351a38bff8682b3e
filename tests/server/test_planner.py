"""What else this machine could run, as the page asks it."""

from __future__ import annotations

import asyncio

import pytest

from fastqwen.errors import FastqwenError
from fastqwen.server.operator import planner
from fastqwen.server.operator.planner import Planner, plan_this_machine
from tests.server.harness import client_of, make_state


def test_the_first_is_a_model_that_answers_and_its_command_is_one_of_ours():
    found = plan_this_machine(0)
    names = [row["model"] for row in found["models"]]
    assert names and not any(name.endswith("-Base") for name in names[:3])
    assert all(row["command"].startswith(f"fastqwen serve {row['model']}") for row in found["models"])


def test_it_is_planned_once_in_a_process_of_its_own():
    async def run() -> None:
        async with client_of(make_state()) as client:
            first, second = await asyncio.gather(client.get("/admin/plan"), client.get("/admin/plan"))
            assert first.json() == second.json()
            assert first.json()["serving"] and first.json()["models"]

    asyncio.run(run())


def test_a_planner_that_fails_says_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(planner, "MODULE", "fastqwen.no_such_module")
    with pytest.raises(FastqwenError, match=r"the planner failed: .*no_such_module"):
        asyncio.run(Planner().found(0))

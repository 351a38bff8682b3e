"""What else this machine could run, as the page asks it."""

from __future__ import annotations

import asyncio

import pytest

from fastqwen.errors import FastqwenError
from fastqwen.plan.advice import best_model, list_models
from fastqwen.plan.gpus import find_target
from fastqwen.server.operator import planner
from fastqwen.server.operator.planner import Planner, plan_this_machine
from tests.server.harness import client_of, make_state


def test_the_first_is_a_model_that_answers_and_its_command_is_one_of_ours():
    found = plan_this_machine(0)
    names = [row["model"] for row in found["models"]]
    assert names and not any(name.endswith("-Base") for name in names[:3])
    assert all(row["command"].startswith(f"fastqwen serve {row['model']}") for row in found["models"])


def test_the_page_recommends_what_the_command_line_does(monkeypatch: pytest.MonkeyPatch):
    target = find_target("cpu")  # once: what is free of it changes all the time
    monkeypatch.setattr(planner, "find_target", lambda name: target)
    rows = plan_this_machine(0)["models"]
    best = best_model(target)
    listed = [one.model for one in list_models(target) if one.fits and one.command and not one.not_served_yet]
    names = [row["model"] for row in rows]
    assert best is not None and (names[0], rows[0]["command"]) == (best.model, best.command)
    assert names[1:] == [name for name in listed if name != best.model]


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

"""What the planner says of each card that people have, and that the documents say the same."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from fastqwen.plan import generations
from fastqwen.plan.advice import answer, best_model, list_models
from fastqwen.plan.catalog import find_published
from fastqwen.plan.facts import GIB
from fastqwen.plan.generations import GENERATIONS, MEASURED_CAPABILITY, generation_of
from fastqwen.plan.gpus import find_target, known_gpus
from fastqwen.plan.memory import Load
from fastqwen.plan.question import PlanOptions, Question
from fastqwen.plan.speed import decode_speed
from tests.kernels import test_compile
from tests.plan import cards, published

ROOT = Path(__file__).parents[2]
# A difference of two times, of which the first was not the GPU's: docs/performance.md, note 1.
TOO_FAST = ("qwen3-0.6b", 256)
MEASURED = {"qwen3-0.6b": "Qwen3-0.6B", "qwen3-8b": "Qwen3-8B", "qwen1-7b": "Qwen-7B", "qwen3-30b-a3b": "Qwen3-30B-A3B"}


@pytest.fixture(autouse=True)
def todays_torch(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("fastqwen.plan.gpus.torch_build", lambda: "cu130")


@pytest.mark.parametrize("card", cards.CARDS)
def test_each_card_runs_or_says_why_not(card: str):
    target = find_target(card)
    found = best_model(target)
    assert found is not None, "something fits on every one of them"
    if target.hindrance is not None:
        assert "has compute capability" in target.hindrance and "cu126" in target.hindrance
        return
    assert found.command is not None and found.fits
    assert shlex.split(found.command)[:3] == ["fastqwen", "serve", found.model]
    generation = generation_of(target.facts.compute_capability)
    assert (found.speed_single is None) == (generation.read is None)
    if generation.capability != MEASURED_CAPABILITY:
        assert any("was at hand" in notice for notice in found.notices)


@pytest.mark.parametrize("card", published.RUNS_ON)
@pytest.mark.parametrize("name", published.MODELS)
def test_each_cell_of_the_published_table_runs_or_says_why_not(card: str, name: str):
    found = published.on_card(name, card)
    assert found.fits == (name in published.RUNS_ON[card])
    assert found.command is not None or not found.fits
    if not found.fits:
        assert found.need.total > found.budget_bytes


def within(name: str, card: str, results: dict[str, Any], config: str) -> int:
    """How many decode figures there are; all but one lie between what is expected at least and at most."""
    model, facts = find_published(name), find_target(card).facts
    assert model is not None
    dtype, count = "float16" if model.model.quantization else "bfloat16", 0
    for key, value in results.items():
        match = re.fullmatch(rf"{config} decode b(\d+) c(\d+)", key)
        batch, context = (int(match[1]), int(match[2])) if match else (0, 0)
        if match is None or (config, batch) == TOO_FAST:
            continue
        load = Load(dtype=dtype, max_model_len=2 * (context + 64), concurrency=batch)
        speed = decode_speed(model.model, load, facts, facts, batch=batch)
        assert speed is not None
        assert speed.low * 0.99 <= batch / value["ms"] * 1e3 <= speed.high * 1.01, (batch, value)
        count += 1
    return count


@pytest.mark.parametrize("config", MEASURED)
def test_what_was_measured_on_an_h200_lies_within_what_is_expected(config: str):
    results = json.loads((ROOT / "bench" / "results" / f"h200-{config}.json").read_text())
    assert within(MEASURED[config], "H200", results, config) >= 3


def test_what_was_measured_in_int4_on_an_h100_lies_within_what_is_expected():
    results = json.loads((ROOT / "bench" / "results" / "h100-packed.json").read_text())["decode"]
    assert within("Qwen-7B-Chat-Int4", "H100 SXM", results, "qwen1-7b-int4") == 3


def test_an_amount_of_memory_is_answered_for_cards_that_run():
    """Old cards of that size neither slow the answer down nor stop it."""
    target = find_target("12GB")
    assert target.hindrance is None and target.facts.total_bytes == 12 * GIB
    assert target.slow.name == "RTX A2000 12GB"
    found = list_models(target, PlanOptions(max_model_len=2048))
    assert found[0].speed_single is not None and "RTX A2000 12GB to" in found[0].speed_single.basis


def test_a_capability_between_two_is_answered_by_the_lower_and_says_so():
    found, target = find_published("Qwen3-8B"), find_target("GB10")
    assert found is not None
    answered = answer(Question.of(PlanOptions(max_model_len=4096), found, target.facts), target)
    assert any("as of 12.0, the next below its 12.1" in notice for notice in answered.notices)


def test_what_is_said_to_be_compiled_is_compiled_by_a_test():
    marks = test_compile.test_what_each_model_launches_compiles_for_a_gpu.pytestmark
    capabilities = next((mark.args[1] for mark in marks if mark.name == "parametrize"), None)
    assert capabilities is not None
    assert {divmod(capability, 10) for capability in capabilities} == set(generations.COMPILED_FOR)


def test_generations_are_in_order_and_cover_every_known_card():
    capabilities = [one.capability for one in GENERATIONS]
    assert capabilities == sorted(capabilities)
    used = {generation_of(gpu.facts().compute_capability).capability for gpu in known_gpus()}
    assert used == set(capabilities)


def test_documented_tables_of_cards_are_the_computed_ones():
    """python -m tests.plan.cards prints them."""
    planner, readme = (ROOT / "docs" / "planner.md").read_text(), (ROOT / "README.md").read_text()
    assert "\n".join(cards.generations_table()) in planner
    assert "\n".join(cards.cards_table()) in planner
    assert "\n".join(cards.readme_table()) in readme
    assert f"lists {len(cards.CARDS)} of them" in readme
    assert f"data sheets of\n{len(known_gpus())} cards" in planner

"""The published tables, reproduced from config.json values alone."""

from __future__ import annotations

from pathlib import Path
from statistics import median

import pytest

from fastqwen.plan.facts import EAGER_2023
from fastqwen.plan.question import PlanOptions
from tests.plan import published

DOCS = Path(__file__).parents[2] / "docs" / "planner.md"


@pytest.mark.parametrize(("name", "length", "num_gpus", "figure"), published.CELLS)
def test_every_cell_within_six_percent(name: str, length: int, num_gpus: int, figure: float):
    assert published.predicted_gib(name, length, num_gpus) == pytest.approx(figure, rel=0.06)


def test_median_cell_within_two_and_a_half_percent():
    differences = [
        abs(published.predicted_gib(name, length, num_gpus) / figure - 1)
        for name, length, num_gpus, figure in published.CELLS
    ]
    assert median(differences) < 0.025


@pytest.mark.parametrize("card", published.RUNS_ON)
@pytest.mark.parametrize(
    "wishes", [PlanOptions(), PlanOptions(profile=EAGER_2023, gpu_memory_utilization=0.99, enforce_eager=True)]
)
def test_what_runs_on_a_card_at_the_own_length(card: str, wishes: PlanOptions):
    """With fastqwen's own habits, and with those of the table's engine."""
    answers = {name: published.on_card(name, card, wishes) for name in published.MODELS}
    assert [name for name, found in answers.items() if found.fits] == published.RUNS_ON[card]


def test_only_one_is_tight_and_its_command_says_how():
    tight = {
        (card, name) for card in published.RUNS_ON for name in published.MODELS if published.on_card(name, card).tight
    }
    assert tight == published.TIGHT
    found = published.on_card("Qwen-14B-Int4", "12GB")
    assert found.need.total <= found.budget_bytes
    command = found.command
    assert command is not None
    assert "--gpu-memory-utilization 0.99" in command
    assert "--enforce-eager" in command


def test_a_model_that_misses_by_little_is_told_its_length():
    found = published.on_card("Qwen-7B-Int4", "12GB")
    assert not found.fits
    assert found.command is not None
    command, length = found.command.rsplit(" ", 1)
    assert command == "fastqwen serve Qwen/Qwen-7B-Chat-Int4 --max-model-len"
    assert 4096 < int(length) < 8192


def test_documented_tables_are_the_computed_ones():
    text = DOCS.read_text(encoding="utf-8")
    assert "\n".join(published.first_table()) in text
    assert "\n".join(published.second_table()) in text

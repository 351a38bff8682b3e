"""The published memory figures for Qwen-1, as the planner's tests read them."""

from __future__ import annotations

from fastqwen.plan.advice import Answer, answer
from fastqwen.plan.catalog import find_published
from fastqwen.plan.facts import EAGER_2023, GIB
from fastqwen.plan.gpus import find_target
from fastqwen.plan.question import PlanOptions, Question, need_of

# Model, sequence length, V100 32 GB GPUs, GiB over all of them. The number of GPUs is not published for every cell; docs/planner.md
# says how it was inferred.
CELLS = [
    ("Qwen-1.8B", 2048, 1, 6.22),
    ("Qwen-1.8B", 8192, 1, 7.46),
    ("Qwen-7B", 2048, 1, 17.94),
    ("Qwen-7B", 8192, 1, 20.96),
    ("Qwen-7B-Int4", 2048, 1, 9.10),
    ("Qwen-7B-Int4", 8192, 1, 12.26),
    ("Qwen-14B", 2048, 2, 33.40),
    ("Qwen-14B-Int4", 2048, 1, 13.30),
    ("Qwen-72B", 2048, 8, 166.87),
    ("Qwen-72B", 8192, 8, 185.50),
    ("Qwen-72B", 16384, 8, 210.80),
    ("Qwen-72B", 32768, 8, 253.80),
    ("Qwen-72B-Int4", 2048, 4, 55.37),
    ("Qwen-72B-Int4", 8192, 4, 73.66),
    ("Qwen-72B-Int4", 16384, 4, 97.79),
    ("Qwen-72B-Int4", 32768, 8, 158.80),
]
MODELS = ["Qwen-1.8B", "Qwen-7B", "Qwen-7B-Int4", "Qwen-14B", "Qwen-14B-Int4", "Qwen-72B", "Qwen-72B-Int4"]
RUNS_ON = {
    "24GB": ["Qwen-1.8B", "Qwen-7B", "Qwen-7B-Int4", "Qwen-14B-Int4"],
    "16GB": ["Qwen-1.8B", "Qwen-7B-Int4", "Qwen-14B-Int4"],
    "12GB": ["Qwen-1.8B", "Qwen-14B-Int4"],
    "11GB": ["Qwen-1.8B"],
    "10GB": ["Qwen-1.8B"],
}
TIGHT = {("12GB", "Qwen-14B-Int4")}


def predicted_gib(name: str, length: int, num_gpus: int) -> float:
    """A cell of the first table: the engine of the table, eager, one sequence of that length."""
    found = find_published(name)
    assert found is not None
    wishes = PlanOptions(
        dtype="float16", max_model_len=length, num_gpus=num_gpus, enforce_eager=True, profile=EAGER_2023
    )
    return need_of(Question.of(wishes, found, find_target("V100 32GB").facts)).total_all_gpus / GIB


def on_card(name: str, card: str, wishes: PlanOptions | None = None) -> Answer:
    """A cell of the second table."""
    found, target = find_published(name), find_target(card)
    assert found is not None
    return answer(Question.of(wishes or PlanOptions(), found, target.facts), target)


def first_table() -> list[str]:
    """The first table beside the prediction, as docs/planner.md shows it."""
    lines = ["| model | length | GPUs | published | predicted | difference |", "|---|---:|---:|---:|---:|---:|"]
    for name, length, num_gpus, figure in CELLS:
        ours = predicted_gib(name, length, num_gpus)
        lines.append(f"| {name} | {length} | {num_gpus} | {figure:.2f} | {ours:.2f} | {ours / figure - 1:+.1%} |")
    return lines


def second_table() -> list[str]:
    lines = ["| GPU memory | models |", "|---:|---|"]
    for card in RUNS_ON:
        answers = {name: on_card(name, card) for name in MODELS}
        words = [f"{name} (tight)" if found.tight else name for name, found in answers.items() if found.fits]
        lines.append(f"| {card} | {', '.join(words)} |")
    return lines

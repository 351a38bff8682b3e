"""The tables of cards in docs/planner.md and README.md, from the planner's own data: python -m tests.plan.cards prints them."""

from __future__ import annotations

from fastqwen.plan.advice import best_model
from fastqwen.plan.facts import GIB
from fastqwen.plan.generations import GENERATIONS, Generation
from fastqwen.plan.gpus import Target, find_target

# Of the guide to Qwen-1's second table of memory, and what people have today.
CARDS = [
    "GTX 1080 Ti", "TITAN Xp", "P40", "V100 16GB", "V100 32GB", "T4", "RTX 2060", "RTX 2080 Ti", "TITAN RTX", "RTX 3060 12GB",
    "RTX 3080 10GB", "RTX 3080 Ti", "RTX 3090", "RTX A4000", "RTX A5000", "RTX A6000", "A10", "A100 80GB", "A800 80GB",
    "RTX 4060", "RTX 4060 Ti 16GB", "RTX 4070", "RTX 4080 SUPER", "RTX 4090", "RTX 6000 Ada", "L4", "L20", "L40S", "H20",
    "H100 SXM", "H200", "GH200 96GB", "B200", "RTX 5060 Ti 16GB", "RTX 5080", "RTX 5090", "RTX PRO 6000",
]  # fmt: skip
RUNS = {"ordinary": "yes", "cu126": "with torch's build for CUDA 12.6", "none": "no"}


def generations_table() -> list[str]:
    lines = [
        "| compute capability | cards | runs | how | reads of its bandwidth | how it was proven |",
        "|---|---|---|---|---|---|",
    ]
    for one in GENERATIONS:
        proof = "" if one.torch_build == "none" else one.proof
        lines.append(
            f"| {one.dotted} {one.name} | {one.cards} | {RUNS[one.torch_build]} | {one.way} | {_reads(one)} | {proof} |"
        )
    return lines


def _reads(one: Generation) -> str:
    return "not known" if one.read is None else f"{one.read[0]:.0%} to {one.read[1]:.0%}, {one.basis}"


def cards_table() -> list[str]:
    lines = [
        "| card | memory | runs | recommended | longest context | tokens/s, one answer |",
        "|---|---:|---|---|---:|---:|",
    ]
    return lines + [_row(find_target(name)) for name in CARDS]


def _row(target: Target) -> str:
    card = f"| {target.label} | {target.facts.total_bytes / GIB:.0f} GiB |"
    if target.hindrance is not None:
        return f"{card} with torch's build for CUDA 12.6 | | | |"
    found = best_model(target)
    assert found is not None
    name, speed = found.model.removeprefix("Qwen/"), found.speed_single
    figures = "not measured" if speed is None else f"{speed.low:.0f} to {speed.high:.0f}"
    return f"{card} yes | {name} | {found.largest_context:,} | {figures} |"


def readme_table() -> list[str]:
    """Generations that run alike share a line."""
    lines = ["| cards | runs | proven by |", "|---|---|---|"]
    alike: dict[tuple[str, str], list[str]] = {}
    for one in GENERATIONS:
        runs = RUNS[one.torch_build] + ("" if one.torch_build == "none" else f": {one.way}")
        alike.setdefault((runs, "" if one.torch_build == "none" else one.proof), []).append(one.cards)
    return lines + [f"| {', '.join(cards)} | {runs} | {proof} |" for (runs, proof), cards in alike.items()]


if __name__ == "__main__":
    for table in (generations_table(), cards_table(), readme_table()):
        print("\n".join(table), end="\n\n")

"""Decoding speed and its share of the floor over batch size, from what bench/gpu_check.py wrote: a line for each model.

python bench/plot_decode.py OUT.png FILE.json [FILE.json ...]

Needs matplotlib: pip install 'fastqwen[plot]'.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from fastqwen.benchmark.curves import draw_shares, draw_speeds, label_sizes, new_figure, set_title
from fastqwen.errors import FastqwenError
from fastqwen.plot import check_plot, save_plot

DECODE = re.compile(r"(\S+) decode b(\d+) c(\d+)")


class Step(NamedTuple):
    path: Path
    model: str
    batch: int
    context: int
    ms: float
    share_of_floor: float


def read_steps(path: Path, report: dict[str, Any]) -> list[Step]:
    found = []
    for name, values in report.items():
        match = DECODE.fullmatch(name)
        if match:
            numbers = (int(match[2]), int(match[3]), float(values["ms"]), float(values["share_of_floor"]))
            found.append(Step(path, match[1], *numbers))
    if not found:
        raise FastqwenError(f"{path} has no result with a name like 'qwen3-0.6b decode b8 c1024'")
    return found


def draw(steps: list[Step], gpus: list[str]) -> Figure:
    figure = new_figure()
    left, right = figure.subplots(1, 2)
    lines = list(dict.fromkeys((one.path, one.model) for one in steps))
    models = [model for _, model in lines]
    for path, model in lines:
        # The same model in two files is two measurements: neither replaces the other.
        label = model if models.count(model) == 1 else f"{model} ({path.stem})"
        own = [one for one in steps if (one.path, one.model) == (path, model)]
        draw_speeds(left, {one.batch: one.batch / one.ms * 1000 for one in own}, label=label)
        draw_shares(right, {one.batch: one.share_of_floor for one in own}, label=label)
    left.set_yscale("log")  # models of very different sizes
    left.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    left.yaxis.set_major_formatter("{x:,.0f}")
    left.set_ylabel("tokens/s")
    right.set_ylabel("share of the floor, in percent")
    for axes in (left, right):
        label_sizes(axes, {one.batch for one in steps})
    left.legend()
    set_title(figure, f"Decoding on {' and '.join(gpus)}", contexts(steps))
    return figure


def contexts(steps: list[Step]) -> str:
    """Such as: 128 tokens of context at batch size 1; 1024 at 8, 64, 256."""
    sizes: dict[int, set[int]] = {}
    for one in steps:
        sizes.setdefault(one.context, set()).add(one.batch)
    (first, at), *others = [(context, ", ".join(map(str, sorted(sizes[context])))) for context in sorted(sizes)]
    return "; ".join([f"{first} tokens of context at batch size {at}", *(f"{more} at {at}" for more, at in others)])


def main() -> None:
    if len(sys.argv) < 3:
        sys.exit("usage: python bench/plot_decode.py OUT.png FILE.json [FILE.json ...]")
    out, *paths = map(Path, sys.argv[1:])
    try:
        check_plot(out)
        reports = {path: json.loads(path.read_text()) for path in paths}
        steps = [one for path, report in reports.items() for one in read_steps(path, report)]
        gpus = sorted({report["machine"]["gpu"] for report in reports.values()})
        save_plot(draw(steps, gpus), out)
    except (FastqwenError, OSError, ValueError) as error:
        sys.exit(f"plot_decode.py: {error}")


if __name__ == "__main__":
    main()

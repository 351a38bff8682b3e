"""Speed, and the share of what the machine allows, over batch size. For ``fastqwen[plot]``: needs matplotlib."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from fastqwen.benchmark.machine import Machine

SIZE_INCHES, DOTS_PER_INCH = (12, 7), 100  # 1200 x 700 pixels
TITLE_CHARACTERS = 100  # as many as fit the width
SPEED_COLOUR, SHARE_COLOUR = "tab:blue", "tab:orange"


def plot_decode(
    model: str, machine: Machine, results: Sequence[Mapping[str, Any]], *, input_len: int, output_len: int
) -> Figure:
    """``results`` are those of decoding steps, as ``bench latency`` reports them."""
    figure = new_figure()
    left = figure.add_subplot()
    right = left.twinx()
    speeds = {int(one["batch"]): float(one["tokens_per_s"]) for one in results}
    draw_speeds(left, speeds, color=SPEED_COLOUR)
    for size, speed in speeds.items():
        text = f"{speed:,.0f}" if speed >= 100 else f"{speed:.1f}"
        left.annotate(text, (size, speed), (-6, 5), textcoords="offset points", ha="right", color=SPEED_COLOUR)
    draw_shares(right, {int(one["batch"]): float(one["bandwidth_share"]) for one in results}, color=SHARE_COLOUR)
    left.set_ylabel("tokens/s", color=SPEED_COLOUR)
    left.set_ylim(0, 1.1 * max(speeds.values()))
    right.set_ylabel(f"share of the memory's bandwidth ({machine.read_gb_s:,.0f} GB/s), in percent", color=SHARE_COLOUR)
    label_sizes(left, speeds)
    threads = f", {machine.threads} threads" if machine.threads else ""
    set_title(
        figure,
        f"{_shown_name(model)}, {machine.dtype}, context of {input_len} to {input_len + output_len} tokens",
        f"{machine.name}{threads}",
    )
    return figure


def new_figure() -> Figure:
    return Figure(figsize=SIZE_INCHES, dpi=DOTS_PER_INCH, layout="constrained")


def set_title(figure: Figure, *lines: str) -> None:
    """The end of a long name says more than its beginning. A $ in it does not begin a formula."""
    short = [line if len(line) <= TITLE_CHARACTERS else "…" + line[1 - TITLE_CHARACTERS :] for line in lines]
    figure.suptitle("\n".join(short), parse_math=False)


def draw_speeds(axes: Axes, speeds: Mapping[int, float], **style: Any) -> None:
    """``speeds``: tokens/s by batch size."""
    sizes = sorted(speeds)
    axes.plot(sizes, [speeds[size] for size in sizes], marker="o", **style)


def draw_shares(axes: Axes, shares: Mapping[int, float], **style: Any) -> None:
    """``shares`` (1.0 is all) by batch size, on an axis that ends at 100%.

    A measured share can be larger, as where a processor's cache holds the weights. Such a point leaves the picture and is
    told in a number: an axis that shows it would press all others together.
    """
    sizes = sorted(shares)
    [line] = axes.plot(sizes, [100 * shares[size] for size in sizes], marker="s", linestyle="--", **style)
    for size in sizes:
        if shares[size] > 1:
            text, colour = f"{100 * shares[size]:.0f}% ↑", line.get_color()
            axes.annotate(text, (size, 100), (0, -4), textcoords="offset points", ha="center", va="top", color=colour)
    axes.set_ylim(0, 100)
    axes.set_yticks(range(0, 101, 10))


def label_sizes(axes: Axes, sizes: Collection[int]) -> None:
    axes.set_xscale("log")
    axes.set_xticks(sorted(sizes), labels=[str(size) for size in sorted(sizes)])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.margins(x=0.08)
    axes.set_xlabel("batch size: sequences that are decoded at once")
    axes.grid(alpha=0.3)


def _shown_name(model: str) -> str:
    """A folder's or file's own name, without the way there."""
    path = Path(model).expanduser()
    return path.resolve().name if path.exists() else model

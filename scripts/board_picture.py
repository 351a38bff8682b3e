"""Draws docs/grafana/fastqwen.json: ``python scripts/board_picture.py PROMETHEUS_URL OUT.png [MINUTES]`` (needs matplotlib).

Every panel asks the board's own queries of a Prometheus that scrapes a server, so a query that is wrong shows as an empty
panel. Each stands where the board has it; colours and fonts are not Grafana's.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import matplotlib.dates
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, PercentFormatter

BOARD = Path(__file__).parents[1] / "docs/grafana/fastqwen.json"
STEP_S = 5
RATE = "1m"  # what Grafana puts in for $__rate_interval at a scrape every 15 s
COLUMNS = 24  # of a board's grid
INCHES_PER_COLUMN, INCHES_PER_ROW = 0.6, 0.32


def series(prometheus: str, query: str, minutes: float) -> list[tuple[dict[str, str], list[Any], list[float]]]:
    """Labels, times and values of each line."""
    end_s = time.time()
    query = query.replace("$model_name", ".*").replace("$__rate_interval", RATE)
    asked: dict[str, Any] = {"query": query, "start": end_s - 60 * minutes, "end": end_s, "step": STEP_S}
    response = httpx.get(f"{prometheus}/api/v1/query_range", params=asked)
    response.raise_for_status()
    found = []
    for line in response.json()["data"]["result"]:
        times = [float(at) / 86400 for at, _ in line["values"]]  # days, as matplotlib counts
        found.append((line["metric"], times, [float(value) for _, value in line["values"]]))
    return found


def draw(axes: Any, panel: dict[str, Any], prometheus: str, minutes: float) -> None:
    for target in panel["targets"]:
        for labels, times, values in series(prometheus, target["expr"], minutes):
            name = target.get("legendFormat", "")
            for key, value in labels.items():
                name = name.replace("{{" + key + "}}", value)
            axes.plot(times, values, linewidth=1.2, label=name)
    axes.set_title(panel["title"], fontsize=9, loc="left")
    axes.xaxis.set_major_formatter(matplotlib.dates.DateFormatter("%H:%M"))
    axes.xaxis.set_major_locator(matplotlib.dates.MinuteLocator())
    axes.set_ylim(0, 1.25 * axes.get_ylim()[1])  # room for the legend
    unit = panel.get("fieldConfig", {}).get("defaults", {}).get("unit")
    if unit == "percentunit":
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    elif unit == "s":
        axes.yaxis.set_major_formatter(FuncFormatter(lambda seconds, _: f"{seconds:g} s"))
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.25)
    if axes.lines:
        axes.legend(fontsize=7, frameon=False, ncols=3, loc="upper left")
    else:
        axes.text(0.5, 0.5, "no data", transform=axes.transAxes, ha="center")


def main(prometheus: str, out: str, minutes: str = "5") -> None:
    panels = json.loads(BOARD.read_text(encoding="utf-8"))["panels"]
    rows = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels)
    figure = Figure(figsize=(COLUMNS * INCHES_PER_COLUMN, rows * INCHES_PER_ROW), layout="constrained")
    grid = figure.add_gridspec(rows, COLUMNS)
    for panel in panels:
        at = panel["gridPos"]
        place = grid[at["y"] : at["y"] + at["h"], at["x"] : at["x"] + at["w"]]
        draw(figure.add_subplot(place), panel, prometheus, float(minutes))
    figure.savefig(out, dpi=75)


if __name__ == "__main__":
    main(*sys.argv[1:])

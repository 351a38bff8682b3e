"""A table for people, then one line of JSON for programs."""

from __future__ import annotations

import functools
import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from fastqwen.benchmark.machine import Machine
from fastqwen.benchmark.work import Needs
from fastqwen.version import __version__

CHECKOUT = Path(__file__).parents[2]  # if this package was not installed
GIT_TIMEOUT_S = 10.0


def describe(machine: Machine) -> str:
    threads = f", {machine.threads} threads" if machine.threads else ""
    return (
        f"{_own_version()}; {machine.name}{threads}; torch {machine.torch}; reads {machine.read_gb_s:.1f} GB/s, "
        f"multiplies {machine.dtype} matrices at {machine.matmul_tflops:.2f} TFLOP/s"
    )


def shares(needs: Needs, seconds: float, machine: Machine) -> dict[str, float]:
    """What part of the machine's best the work used, of memory and of arithmetic.

    ``floor_share``: of the time, what the slower of the two would need for the work if nothing else took any.
    """
    read_s = needs.read_bytes / (machine.read_gb_s * 1e9)
    compute_s = needs.operations / (machine.matmul_tflops * 1e12)
    return {
        "bandwidth_share": round(read_s / seconds, 4),
        "flop_share": round(compute_s / seconds, 4),
        "floor_share": round(max(read_s, compute_s) / seconds, 4),
    }


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The first column to the left, numbers to the right."""
    widths = [max(len(line[index]) for line in (headers, *rows)) for index in range(len(headers))]

    def line(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        return "  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]).rstrip()

    return "\n".join([line(headers), line(["-" * width for width in widths]), *map(line, rows)])


def percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def finish(kind: str, machine: Machine | None, results: dict[str, Any]) -> None:
    """The last line of every benchmark."""
    told = None if machine is None else msgspec.to_builtins(machine)
    head = {"benchmark": kind, "command": shlex.join(["fastqwen", *sys.argv[1:]])}
    line = {**head, "version": __version__, "commit": commit(), "machine": told, **results}
    print(json.dumps(line), flush=True)


@functools.cache  # the first call, before the work, counts: the tree may change while a benchmark runs
def commit(folder: Path = CHECKOUT) -> str | None:
    """Of the checkout that this package runs from, with -dirty if its files were changed. None without one, or git."""
    if not (folder / ".git").exists():
        return None
    # Without optional locks: a look must not come between others who work in the same checkout.
    command = ["git", "--no-optional-locks", "-C", str(folder), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=GIT_TIMEOUT_S)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _own_version() -> str:
    found = commit()
    return f"fastqwen {__version__}" + (f" ({found})" if found else "")

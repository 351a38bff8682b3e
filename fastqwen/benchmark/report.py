"""A table for people, then one line of JSON for programs."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from typing import Any

import msgspec

from fastqwen.benchmark.machine import Machine
from fastqwen.benchmark.work import Needs


def describe(machine: Machine) -> str:
    threads = f", {machine.threads} threads" if machine.threads else ""
    return (
        f"{machine.name}{threads}; torch {machine.torch}; reads {machine.read_gb_s:.1f} GB/s, "
        f"multiplies {machine.dtype} matrices at {machine.matmul_tflops:.2f} TFLOP/s"
    )


def shares(needs: Needs, seconds: float, machine: Machine) -> dict[str, float]:
    """What part of the machine's best the work used, of memory and of arithmetic."""
    return {
        "bandwidth_share": round(needs.read_bytes / seconds / (machine.read_gb_s * 1e9), 4),
        "flop_share": round(needs.operations / seconds / (machine.matmul_tflops * 1e12), 4),
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
    line = {"benchmark": kind, "command": shlex.join(["fastqwen", *sys.argv[1:]]), "machine": told, **results}
    print(json.dumps(line), flush=True)

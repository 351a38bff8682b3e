"""fastqwen bench"""

from __future__ import annotations

import typer

app = typer.Typer(help="Measure speed, and compare it with what the machine's memory allows.", no_args_is_help=True)

"""What the commands share: where they print, and how they end when something is wrong."""

from __future__ import annotations

from typing import NoReturn

import typer
from rich.console import Console, RenderableType

WIDE = 170  # characters: what the larger tables need

console = Console()


def print_wide(what: RenderableType) -> None:
    """Also where a terminal has fewer columns: lines that wrap are better than figures that are cut away."""
    Console(width=max(WIDE, console.width)).print(what)


def fail(message: str) -> NoReturn:
    """One line on standard error and exit code 1."""
    Console(stderr=True).print(f"tandem: {message}", style="red", markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(1)

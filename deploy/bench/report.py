"""One measured figure and the limit it is judged by; a table of them; JSON."""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True, slots=True)
class Figure:
    section: str
    name: str
    value: float
    unit: str
    roofline: float | None = None  # what the machine's measured limits allow, in the same unit
    spread: float = 0.0  # (max - min) / median of the repetitions
    lower_is_better: bool = False

    @property
    def fraction(self) -> float | None:
        if not self.roofline:
            return None
        return self.roofline / self.value if self.lower_is_better else self.value / self.roofline


def median(samples: list[float]) -> tuple[float, float]:
    """(median, spread)."""
    middle = statistics.median(samples)
    return middle, (max(samples) - min(samples)) / middle if middle else 0.0


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def show(figures: list[Figure], console: Console) -> None:
    table = Table(title="tandem bench")
    for column in ("section", "figure", "value", "unit", "roofline", "fraction", "spread"):
        table.add_column(column, justify="left" if column in ("section", "figure", "unit") else "right")
    for f in figures:
        table.add_row(
            f.section,
            f.name,
            _short(f.value),
            f.unit,
            _short(f.roofline) if f.roofline else "",
            f"{f.fraction:.2f}" if f.fraction else "",
            f"{f.spread:.0%}" if f.spread else "",
        )
    console.print(table)


def _short(value: float) -> str:
    return f"{value:,.1f}" if value >= 10 else f"{value:.2f}"


def write(figures: list[Figure], path: Path) -> None:
    path.write_text(json.dumps([dataclasses.asdict(f) | {"fraction": f.fraction} for f in figures], indent=1) + "\n")

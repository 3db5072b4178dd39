"""What simulations found, for people and programs: a table on the terminal, JSON, and one HTML page with plots.

A result is a plain dictionary of JSON, `SimResult.to_json()`. Every figure in FIGURES is optional: what a run does not
have is left out. For the plots a result may have
    series             name -> list as long as series["time_s"]: "waiting" (requests), "prefill", "decode", "both"
    ttft_quantiles_ms  101 values, of the 0th to the 100th percentile; itl_quantiles_ms likewise
The page holds everything it needs: it loads nothing from anywhere.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from cluster.errors import ConfigError

Result = Mapping[str, Any]

# key in a result -> (what people read, unit)
FIGURES: dict[str, tuple[str, str]] = {
    "workers": ("workers", ""),
    "gpus": ("GPUs", ""),
    "requests": ("requests", ""),
    "finished": ("finished", ""),
    "refused": ("refused", ""),
    "failed": ("failed", ""),
    "duration_s": ("virtual time", "s"),
    "request_rps": ("requests offered", "1/s"),
    "goodput_rps": ("goodput", "1/s"),
    "attainment": ("within the SLO", "%"),
    "ttft_mean_ms": ("TTFT mean", "ms"),
    "ttft_p50_ms": ("TTFT P50", "ms"),
    "ttft_p90_ms": ("TTFT P90", "ms"),
    "ttft_p99_ms": ("TTFT P99", "ms"),
    "itl_mean_ms": ("ITL mean", "ms"),
    "itl_p50_ms": ("ITL P50", "ms"),
    "itl_p90_ms": ("ITL P90", "ms"),
    "itl_p99_ms": ("ITL P99", "ms"),
    "hit_ratio": ("prompt tokens hit", "%"),
    "load_max_over_mean": ("load, max / mean", ""),
    "utilisation": ("workers busy", "%"),
    "flips": ("role changes", ""),
    "starts": ("workers started", ""),
    "stops": ("workers stopped", ""),
    "requests_per_wall_second": ("simulated", "requests/s"),
    "peak_memory_mib": ("peak memory", "MiB"),
}
COLUMNS = 8  # runs beside one another on a page
CSS = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #1c2430; }
table { border-collapse: collapse; margin: 1rem 0; } td { padding: .15rem .8rem; text-align: right; }
td:first-child { text-align: left; } thead { font-weight: 600; } tr + tr td { border-top: 1px solid #dde3ea; }
figure { display: inline-block; margin: 0 1rem 1rem 0; } svg { max-width: 100%; height: auto; }
pre { background: #f4f6f8; padding: .6rem .8rem; overflow-x: auto; }
"""


def show(results: Sequence[Result], console: Console) -> None:
    """One column per run."""
    table = Table(title="tandem simulate")
    table.add_column("figure")
    table.add_column("unit")
    for name in _names(results):
        table.add_column(name, justify="right")
    for label, unit, values in _rows(results):
        table.add_row(label, unit, *values)
    console.print(table)


def show_rows(title: str, rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    """One line per run: whatever the rows hold, in the order of the first one's keys."""
    table = Table(title=title)
    columns = list(rows[0]) if rows else []
    for column in columns:
        table.add_column(column, justify="left" if isinstance(rows[0][column], str) else "right")
    for row in rows:
        table.add_row(*(shown(row.get(column)) for column in columns))
    console.print(table)


def write_json(content: Any, path: Path) -> None:
    """Raises ConfigError when the file cannot be written."""
    _write(path, json.dumps(content, indent=1) + "\n")


def write_html(results: Sequence[Result], path: Path, title: str = "tandem simulate") -> None:
    """Raises ConfigError when the file cannot be written or matplotlib is not there."""
    try:
        from loadtests.simulator import (
            plots,
        )  # matplotlib takes a second to import and comes with tandem-serve[loadtest]
    except ModuleNotFoundError as error:
        raise ConfigError(f"plots need {error.name}; install it with: pip install 'tandem-serve[loadtest]'") from error
    names = _names(results)
    figures = "".join(f"<figure>{svg}</figure>" for svg in plots.drawings(list(zip(names, results, strict=True))))
    _write(path, _page(title, _html_table(results, names), figures, _html_settings(results, names)))


def shown(value: Any) -> str:
    """A figure with as many digits as it deserves."""
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.1f}" if abs(value) >= 100 else f"{value:.3g}"


def _names(results: Sequence[Result]) -> list[str]:
    return [str(result.get("name", f"run {number}")) for number, result in enumerate(results, 1)]


def _rows(results: Sequence[Result]) -> list[tuple[str, str, list[str]]]:
    """(figure, unit, value of each run), of the figures that some run has."""
    rows = []
    for key, (label, unit) in FIGURES.items():
        values = [result.get(key) for result in results]
        if any(value is not None for value in values):
            scale = 100 if unit == "%" else 1
            rows.append((label, unit, [shown(value * scale if value is not None else None) for value in values]))
    return rows


def _html_table(results: Sequence[Result], names: Sequence[str]) -> str:
    """A column per run, or a row per run where there are many."""
    rows = [(f"{label} ({unit})" if unit else label, *values) for label, unit, values in _rows(results)]
    table = [("", *names), *rows]
    if len(results) > COLUMNS:
        table = list(zip(*table, strict=True))
    head, *body = ("".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in table)
    return f"<table><thead><tr>{head}</tr></thead>" + "".join(f"<tr>{row}</tr>" for row in body) + "</table>"


def _html_settings(results: Sequence[Result], names: Sequence[str]) -> str:
    """Of every run; of many, which differ in little, only the first's."""
    return "".join(
        f"<h3>{html.escape(name)}</h3><pre>{html.escape(json.dumps(result['settings'], indent=1))}</pre>"
        for name, result in list(zip(names, results, strict=True))[: COLUMNS if len(results) <= COLUMNS else 1]
        if "settings" in result
    )


def _page(title: str, table: str, figures: str, settings: str) -> str:
    title = html.escape(title)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{CSS}</style></head>'
        f"<body><h1>{title}</h1>{table}{figures}<h2>Settings</h2>{settings}</body></html>\n"
    )


def _write(path: Path, content: str) -> None:
    try:
        path.write_text(content)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error}") from error

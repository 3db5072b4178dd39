"""The report of load tests: one HTML page that explains its terms, holds all its plots and loads nothing from anywhere.

    python -m loadtests.page --out both.html tandem/chat.json vllm/chat.json      # runs side by side

A run is what figures.py says it is; runs of several servers or scenarios stand beside one another. No address, model
name or error text gets into the page unescaped.
"""

from __future__ import annotations

import argparse
import html
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.errors import ConfigError
from loadtests import plots
from loadtests.figures import DEFINITIONS
from loadtests.simulator.report import CSS, shown

Run = Mapping[str, Any]
# figure -> (what people read, unit); a figure that no scenario has is left out
FIGURES: dict[str, tuple[str, str]] = {
    "requests": ("answered", ""),
    "failed": ("failed", "%"),
    "cut": ("cut", ""),
    "left": ("left", ""),
    "requests_per_s": ("requests", "1/s"),
    "goodput_rps": ("goodput", "1/s"),
    "good": ("good", "%"),
    "ttft_p50_ms": ("TTFT P50", "ms"),
    "ttft_p95_ms": ("TTFT P95", "ms"),
    "ttft_p99_ms": ("TTFT P99", "ms"),
    "tpot_mean_ms": ("TPOT mean", "ms"),
    "tpot_p95_ms": ("TPOT P95", "ms"),
    "itl_p50_ms": ("ITL P50", "ms"),
    "itl_p95_ms": ("ITL P95", "ms"),
    "itl_p99_ms": ("ITL P99", "ms"),
    "e2e_p50_ms": ("E2E P50", "ms"),
    "e2e_p95_ms": ("E2E P95", "ms"),
    "output_tokens_per_s": ("output", "tokens/s"),
    "prompt_tokens_per_s": ("prompts", "tokens/s"),
    "prompt_tokens_mean": ("prompt, mean", "tokens"),
    "output_tokens_mean": ("answer, mean", "tokens"),
    "cached_share": ("prompt tokens cached", "%"),
    "late_p50_ms": ("send delay P50", "ms"),
    "late_p99_ms": ("send delay P99", "ms"),
    "late_share": ("sent over 50 ms late", "%"),
}
MORE_CSS = """
.missed { color: #b00020; font-weight: 600; } .kept { color: #1b6e3c; }
dt { font-weight: 600; } dd { margin: 0 0 .4rem 1rem; }
.wide { overflow-x: auto; } th { font-weight: 600; text-align: right; padding: .15rem .8rem; }
"""


def write(runs: Sequence[Run], path: Path, title: str = "Load test") -> None:
    """Raises ConfigError when the file cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page(runs, title))
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error}; give another folder") from error


def page(runs: Sequence[Run], title: str = "Load test") -> str:
    """The whole document."""
    lines = _lines(runs)
    title = html.escape(title)
    body = "".join(
        (
            f"<h1>{title}</h1>",
            _verdicts(runs),
            "<h2>Terms</h2><dl>",
            *(f"<dt>{html.escape(term)}</dt><dd>{html.escape(text)}</dd>" for term, text in DEFINITIONS.items()),
            "</dl><h2>Figures</h2>",
            _table(lines),
            *(f"<figure>{drawing}</figure>" for drawing in plots.drawings(lines)),
            _errors(runs),
            "<h2>Runs</h2>",
            *(_settings(run) for run in runs),
        )
    )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title>'
        f"<style>{CSS}{MORE_CSS}</style></head><body>{body}</body></html>\n"
    )


def _lines(runs: Sequence[Run]) -> list[tuple[str, Mapping[str, Any]]]:
    """(label, figures) of every scenario of every run; runs are named where there are several."""
    several = len({run["name"] for run in runs}) > 1
    return [
        (f"{run['name']}: {name}" if several else name, figures)
        for run in runs
        for name, figures in run["scenarios"].items()
    ]


def _verdicts(runs: Sequence[Run]) -> str:
    verdicts = [verdict for run in runs for verdict in run["verdicts"]]
    missed = [verdict for verdict in verdicts if not verdict["kept"]]
    head = (
        f'<p class="missed">{len(missed)} of {len(verdicts)} limits were missed</p>'
        if missed
        else f'<p class="kept">All of {len(verdicts)} limits were kept</p>'
    )
    rows = "".join(
        f'<tr class="{"kept" if v["kept"] else "missed"}"><td>{html.escape(v["scenario"])}</td>'
        f"<td>{html.escape(v['limit'])}</td><td>{shown(v['wanted'])}</td>"
        f"<td>{'not measured' if v['measured'] is None else shown(v['measured'])}</td>"
        f"<td>{'kept' if v['kept'] else 'missed'}</td></tr>"
        for v in sorted(verdicts, key=lambda v: v["kept"])
    )
    heads = _heads("scenario", "limit", "wanted", "measured", "")
    return f'{head}<div class="wide"><table><thead><tr>{heads}</tr></thead>{rows}</table></div>'


def _table(lines: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """A row per figure, a column per scenario."""
    rows = "".join(
        f"<tr><td>{html.escape(label)}</td><td>{unit}</td>{''.join(_cells(key, unit, lines))}</tr>"
        for key, (label, unit) in FIGURES.items()
        if any(key in figures for _, figures in lines)
    )
    heads = _heads("", "", *(name for name, _ in lines))
    return f'<div class="wide"><table><thead><tr>{heads}</tr></thead>{rows}</table></div>'


def _heads(*names: str) -> str:
    return "".join(f"<th>{html.escape(name)}</th>" for name in names)


def _cells(key: str, unit: str, lines: Sequence[tuple[str, Mapping[str, Any]]]) -> Iterator[str]:
    for _, figures in lines:
        value = figures.get(key)
        yield f"<td>{shown(value * 100 if value is not None and unit == '%' else value)}</td>"


def _errors(runs: Sequence[Run]) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(scenario)}</td><td>{html.escape(error)}</td><td>{times}</td></tr>"
        for run in runs
        for scenario, error, times in run["errors"]
    )
    return f"<h2>Errors</h2><table>{rows}</table>" if rows else ""


def _settings(run: Run) -> str:
    known = {key: run[key] for key in ("url", "model", "window_s", "settings")}
    return f"<h3>{html.escape(run['name'])}</h3><pre>{html.escape(json.dumps(known, indent=1))}</pre>"


def main() -> None:
    parser = argparse.ArgumentParser(description="One report of several load tests, side by side.")
    parser.add_argument("runs", type=Path, nargs="+", help="JSON files that load tests have written")
    parser.add_argument("--out", type=Path, default=Path("report.html"))
    given = parser.parse_args()
    try:
        write([json.loads(path.read_text()) for path in given.runs], given.out, "Load tests")
    except (OSError, ValueError, KeyError, ConfigError) as error:
        sys.exit(f"no report: {error}")
    sys.stdout.write(f"{given.out}\n")


if __name__ == "__main__":
    main()

"""The drawings of a report, as SVG that can stand in a page. The only file that needs matplotlib.

Each takes (name, result) pairs, one line per run, and is left out when no run has what it shows.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("svg")  # before pyplot is imported by anybody: no window system is asked for
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Runs = Sequence[tuple[str, Mapping[str, Any]]]
SIZE = (5.6, 3.2)  # inches
POINTS = 1_000  # of a line; more cannot be seen
LABELS = 16  # in a legend; more would leave no room for the drawing
STYLE: Any = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "tandem",  # the same run is the same file
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "font.size": 9,
}


def drawings(runs: Runs) -> Iterator[str]:
    """SVG elements: queue, ratio, TTFT, ITL, goodput against rate."""
    for draw in (_queue, _roles, _ttft, _itl, _goodput):
        with matplotlib.rc_context(STYLE):
            figure = Figure(figsize=SIZE, layout="constrained")
            if draw(figure.add_subplot(), runs):
                yield svg(figure)


def svg(figure: Figure) -> str:
    """The figure as an element."""
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    text = out.getvalue()
    return text[text.index("<svg") :]  # without the XML declaration, which a page cannot hold


def _queue(axes: Axes, runs: Runs) -> bool:
    _labels(axes, "Requests that wait for a worker", "time (s)", "requests")
    return _over_time(axes, runs, {"waiting": "-"})


def _roles(axes: Axes, runs: Runs) -> bool:
    _labels(axes, "Workers by role", "time (s)", "workers")
    return _over_time(axes, runs, {"prefill": "-", "decode": "--", "both": ":"}, drawstyle="steps-post")


def _over_time(axes: Axes, runs: Runs, names: Mapping[str, str], **line: Any) -> bool:
    """`names` maps the name of a series to the style of its line; runs differ by colour."""
    drawn = False
    for number, (run, result) in enumerate(runs):
        series = result.get("series", {})
        times = series.get("time_s", [])
        stride = max(1, len(times) // POINTS)
        for name, style in names.items():
            values = series.get(name, [])
            if any(values) or (values and len(names) == 1):  # a role that nobody ever had is no line
                label = f"{run}: {name}" if len(names) > 1 else run
                axes.plot(times[::stride], values[::stride], style, color=f"C{number % 10}", label=label, **line)
                drawn = True
    return _legend(axes, drawn)


def _ttft(axes: Axes, runs: Runs) -> bool:
    _labels(axes, "Time to first token", "TTFT (ms)", "% of requests")
    return _distribution(axes, runs, "ttft")


def _itl(axes: Axes, runs: Runs) -> bool:
    _labels(axes, "Time between tokens", "ITL (ms)", "% of tokens")
    return _distribution(axes, runs, "itl")


def _distribution(axes: Axes, runs: Runs, what: str) -> bool:
    """Cumulative, on a logarithmic axis; the SLO is a vertical line."""
    drawn = False
    for number, (name, result) in enumerate(runs):
        if values := result.get(f"{what}_quantiles_ms"):
            axes.plot(values, [100 * i / (len(values) - 1) for i in range(len(values))], label=name)
            drawn = True
        if drawn and number == 0 and (slo := result.get(f"{what}_slo_ms")):
            axes.axvline(slo, color="black", linestyle=":", linewidth=1, label="SLO")
    axes.set_xscale("log")
    return _legend(axes, drawn)


def _goodput(axes: Axes, runs: Runs) -> bool:
    """Only where runs differ in rate: the runs of one `curve` (by default all) are a line."""
    _labels(axes, "Goodput against rate", "requests offered (1/s)", "within the SLO (1/s)")
    curves: dict[str, list[tuple[float, float]]] = {}
    for _, result in runs:
        if "request_rps" in result and "goodput_rps" in result:
            curves.setdefault(str(result.get("curve", "")), []).append((result["request_rps"], result["goodput_rps"]))
    drawn = False
    for curve, points in curves.items():
        if len({rate for rate, _ in points}) > 1:
            axes.plot(*zip(*sorted(points), strict=True), marker="o", markersize=3, label=curve or None)
            drawn = True
    return _legend(axes, drawn)


def _labels(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, loc="left")
    axes.set_xlabel(x)
    axes.set_ylabel(y)


def _legend(axes: Axes, drawn: bool) -> bool:
    if 0 < len(axes.get_legend_handles_labels()[1]) <= LABELS:
        axes.legend(fontsize=8, frameon=False)
    return drawn

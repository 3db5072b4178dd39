"""The drawings of a load test, as SVG that can stand in a page: distributions, and what happened over time.

Each takes (label, figures of a scenario) pairs, one line per pair, and is left out when none has what it shows. Style
and size are those of the simulator's drawings, so that served and simulated runs can lie side by side.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from loadtests.simulator.plots import LABELS, SIZE, STYLE, svg

Lines = Sequence[tuple[str, Mapping[str, Any]]]
# span -> (title, label of the axis, what there are so many per cent of)
DISTRIBUTIONS = {
    "ttft": ("Time to first token", "TTFT (ms)", "% of requests"),
    "itl": ("Time between tokens", "ITL (ms)", "% of gaps"),
    "tpot": ("Time per output token", "TPOT (ms)", "% of requests"),
    "late": ("Send delay", "later than its time (ms)", "% of requests"),
}
# title, label of the axis, name of the series and the style of its line
TIMELINES: Sequence[tuple[str, str, Mapping[str, str]]] = (
    ("TTFT by when requests were sent: P50, P95 dashed", "TTFT (ms)", {"ttft_p50_ms": "-", "ttft_p95_ms": "--"}),
    ("ITL by when tokens came: P50, P95 dashed", "ITL (ms)", {"itl_p50_ms": "-", "itl_p95_ms": "--"}),
    ("Requests sent, and good ones dashed", "requests/s", {"sent_per_s": "-", "good_per_s": "--"}),
    ("Output tokens by when they came", "tokens/s", {"output_tokens_per_s": "-"}),
)


def drawings(lines: Lines) -> list[str]:
    """SVG elements, distributions first."""
    with matplotlib.rc_context(STYLE):
        return [*_distributions(lines), *_timelines(lines)]


def _distributions(lines: Lines) -> Iterator[str]:
    """Cumulative, on a logarithmic axis."""
    for span, labels in DISTRIBUTIONS.items():
        given = [(name, figures["quantiles"][span]) for name, figures in lines if span in figures["quantiles"]]
        if given:
            axes = _axes(*labels)
            for name, values in given:
                axes.plot(values, range(len(values)), label=name, linewidth=1)
            axes.set_xscale("log")
            yield _finished(axes)


def _timelines(lines: Lines) -> Iterator[str]:
    """A colour per run; only the first of its lines is in the legend. Times of 0 are gaps: nothing was measured."""
    if not any(len(figures["series"]["time_s"]) > 1 for _, figures in lines):
        return
    for title, unit, styles in TIMELINES:
        axes = _axes(title, "seconds since the beginning", unit)
        for number, (name, figures) in enumerate(lines):
            series, label = figures["series"], name
            for key, style in styles.items():
                values = [value or math.nan if key.endswith("_ms") else value for value in series[key]]
                axes.plot(series["time_s"], values, style, color=f"C{number % 10}", label=label, linewidth=1)
                label = "_"  # matplotlib leaves such labels out of the legend
        yield _finished(axes)


def _axes(title: str, x: str, y: str) -> Axes:
    axes = Figure(figsize=SIZE, layout="constrained").add_subplot()
    axes.set_title(title, loc="left")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    return axes


def _finished(axes: Axes) -> str:
    if 0 < len(axes.get_legend_handles_labels()[1]) <= LABELS:
        axes.legend(fontsize=8, frameon=False)
    figure = axes.get_figure(root=True)
    assert figure is not None
    return svg(figure)

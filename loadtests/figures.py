"""From measurements to the figures of a run, as plain JSON that reports, plots and SLOs read; pure.

A run is {"name", "url", "model", "window_s", "settings", "scenarios": {name: figures}, "verdicts", "errors"}. A
scenario's figures are numbers, except for `quantiles` (span -> 101 values of the 0th to the 100th percentile, in
milliseconds) and `series` (name -> a value per slot, `time_s` among them). A figure that was not measured is left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from loadtests.measurements import SPANS, Measurements, Slot
from loadtests.simulator.histogram import Histogram

POINTS = 120  # of a line over time
PERCENTILES = (50, 90, 95, 99)
SPAN = re.compile(r"(ttft|itl|tpot|e2e|late)_p([\d.]+)_ms")
DEFINITIONS = {
    "TTFT": "time to first token: from sending a request to the first chunk of its answer that holds text",
    "ITL": "time between tokens: the gap between one such chunk and the next; a server that sends several tokens in a "
    "chunk has fewer and longer gaps, so compare servers by TPOT",
    "TPOT": "time per output token after the first: (end of the answer - first token) / (output tokens - 1), once per "
    "request",
    "E2E": "from sending a request to the end of its answer",
    "goodput": "answered requests a second whose TTFT and TPOT were both within the SLO's within_ttft_ms and "
    "within_tpot_ms",
    "window": "from the end of the warm-up to the last answer; every rate is per second of it, and what was sent "
    "before it is not counted",
    "tokens": "as the server's usage says; nothing is tokenized by the client",
    "failed, cut, left": "requests that ended in an error; that had no end when the run ended; whose user went away on "
    "purpose; none of them is in any time above",
    "send delay": "how much later than its time a request was sent, where requests have times (open loop); the other "
    "scenarios are closed loops: a user waits for the answer, so a slow server gets less load",
}


def scenario(slot: Slot, window_s: float) -> dict[str, Any]:
    """A scenario's figures without its series, from all that happened in it."""
    counts, spans = slot.counts, slot.spans
    answered, begun = counts["answered"], counts["begun"]
    ended = answered + counts["failed"]
    figures: dict[str, Any] = {
        "requests": answered,
        "sent": begun,
        "cut": begun - ended - counts["left"],
        "left": counts["left"],
        "requests_per_s": answered / window_s,
    }
    if ended:
        figures["failed"] = counts["failed"] / ended
    if answered:
        figures |= {"good": counts["good"] / answered, "goodput_rps": counts["good"] / window_s}
    if answered > counts["uncounted"]:
        figures |= {
            "prompt_tokens_per_s": counts["prompt_tokens"] / window_s,
            "output_tokens_per_s": counts["output_tokens"] / window_s,
            "prompt_tokens_mean": counts["prompt_tokens"] / (answered - counts["uncounted"]),
            "output_tokens_mean": counts["output_tokens"] / (answered - counts["uncounted"]),
            "cached_share": counts["cached_tokens"] / max(1.0, counts["prompt_tokens"]),
        }
    if spans["late"].count:
        figures["late_share"] = counts["late"] / begun
    for name in SPANS:
        if spans[name].count:
            figures |= _distribution(name, spans[name])
    figures["quantiles"] = {name: quantiles(spans[name]) for name in SPANS if spans[name].count}
    return figures


def _distribution(name: str, histogram: Histogram) -> dict[str, float]:
    percentiles = {f"{name}_p{part}_ms": histogram.quantile(part / 100) for part in PERCENTILES}
    return {f"{name}_mean_ms": histogram.mean, **percentiles}


def quantiles(histogram: Histogram) -> list[float]:
    """Of the 0th to the 100th percentile."""
    return [histogram.quantile(part / 100) for part in range(101)]


def asked_for(measurements: Measurements, scenario_name: str, limits: Mapping[str, float]) -> dict[str, float]:
    """Percentiles that an SLO names and that no table has, such as itl_p99.9_ms."""
    spans = measurements.whole(scenario_name).spans
    matches = [match for limit in limits if (match := SPAN.fullmatch(limit))]
    return {m[0]: spans[m[1]].quantile(float(m[2]) / 100) for m in matches if spans[m[1]].count}


def series(measurements: Measurements, scenario_name: str) -> dict[str, list[float]]:
    """Rates and percentiles over time, in at most POINTS steps; 0 where nothing happened."""
    rows = list(_steps(measurements, scenario_name))
    made: dict[str, list[float]] = {"time_s": [at_s for at_s, _, _ in rows]}
    for name, count in (("sent", "begun"), ("good", "good"), ("output_tokens", "streamed_tokens")):
        made[f"{name}_per_s"] = [slot.counts[count] / width_s for _, width_s, slot in rows]
    for span in ("ttft", "itl"):
        for part in (50, 95):
            made[f"{span}_p{part}_ms"] = [slot.spans[span].quantile(part / 100) for _, _, slot in rows]
    return made


def _steps(measurements: Measurements, scenario_name: str) -> Iterator[tuple[float, float, Slot]]:
    """(its beginning, its length in seconds, what happened) of each step."""
    slots = measurements.slots.get(scenario_name, {})
    if not slots:
        return
    first, last = min(slots), max(slots)
    each = -(-(last - first + 1) // POINTS)
    for begin in range(first, last + 1, each):
        step = Slot()
        for number in range(begin, begin + each):
            if number in slots:
                step.merge(slots[number])
        yield begin * measurements.slot_s, each * measurements.slot_s, step

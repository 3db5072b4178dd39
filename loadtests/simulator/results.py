"""What a run found: every request's times while it goes, and the figures of them all at the end.

The figures of the same requests, settings and seed are the same to the last digit, but for those that tell of the
simulating machine: `WALL`.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from loadtests.simulator.histogram import Histogram
from loadtests.simulator.job import Job
from loadtests.simulator.settings import SimSettings
from router.placement import Decision

WALL = ("wall_s", "requests_per_wall_second", "requests_per_cpu_second", "events_per_wall_second", "peak_memory_mib")
COLUMNS = (
    "number",
    "arrival_s",
    "ttft_ms",
    "itl_ms",
    "finish_s",
    "prompt_tokens",
    "cached_tokens",
    "output_tokens",
    "turn",
)
POINTS = 600  # of a series at most: beyond it every other one goes


@dataclass(frozen=True, slots=True)
class SimResult:
    """`requests`: column -> values of the requests that finished, in the order in which they did (`COLUMNS`)."""

    figures: dict[str, float]
    settings: SimSettings
    series: dict[str, list[float]]  # name -> values at the times series["time_s"]
    ttft_quantiles_ms: list[float]  # 0th to 100th percentile
    itl_quantiles_ms: list[float]
    requests: dict[str, array[float]]
    events: tuple[str, ...] = ()  # what the plan did, in words

    def to_json(self) -> dict[str, Any]:
        """The figures by name, beside settings, series and quantiles; without single requests."""
        return {
            **self.figures,
            "ttft_slo_ms": self.settings.ttft_slo_ms,
            "itl_slo_ms": self.settings.itl_slo_ms,
            "seed": self.settings.seed,
            "settings": self.settings.values(),
            "series": self.series,
            "ttft_quantiles_ms": self.ttft_quantiles_ms,
            "itl_quantiles_ms": self.itl_quantiles_ms,
            "events": list(self.events),
        }


class Recorder:
    """Counts while the run goes. The counters with `_total` are those that a router reports."""

    def __init__(self, settings: SimSettings) -> None:
        self.gaps = Histogram()  # ms between two tokens of a request
        self.requests = {name: array("d") for name in COLUMNS}
        self.requests_total = self.prompt_tokens_total = self.uncached_tokens_total = self.output_tokens_total = 0
        self.refusals = 0
        self.last_arrival_s = 0.0
        self.recent_ttft_ms: list[float] = []  # of those that began since the plan looked last
        self.began_total = self.hit_tokens = self.began_tokens = 0
        self.fetched_memory_tokens = self.fetched_remote_tokens = 0
        self.placements = self.append_prefills = 0
        self.series: dict[str, list[float]] = {"time_s": []}
        self._settings = settings
        self._skip = self._skipped = 0
        self._gaps_before = (0, 0.0)  # count and sum when they were last asked for

    def arrived(self, job: Job) -> None:
        self.requests_total += 1
        self.prompt_tokens_total += job.request.prompt_tokens
        self.last_arrival_s = job.arrival_s

    def refused(self, job: Job) -> None:
        self.refusals += 1

    def placed(self, job: Job, decision: Decision) -> None:
        self.placements += 1
        self.uncached_tokens_total += decision.uncached_tokens
        if decision.route.prefill is None:
            self.append_prefills += 1

    def fetched(self, tokens: int, local: bool) -> None:
        if local:
            self.fetched_memory_tokens += tokens
        else:
            self.fetched_remote_tokens += tokens

    def began(self, job: Job) -> None:
        self.began_total += 1
        self.began_tokens += job.request.prompt_tokens
        self.hit_tokens += min(job.cached, job.request.prompt_tokens)
        self.recent_ttft_ms.append(1000 * (job.first_token_s - job.arrival_s))

    def finished(self, job: Job) -> None:
        request = job.request
        self.output_tokens_total += request.output_tokens
        gaps = request.output_tokens - 1
        values = (
            job.number,
            job.arrival_s,
            1000 * (job.first_token_s - job.arrival_s),
            1000 * (job.finish_s - job.first_token_s) / gaps if gaps else 0.0,
            job.finish_s,
            request.prompt_tokens,
            min(job.cached, request.prompt_tokens),
            request.output_tokens,
            request.turn,
        )
        for column, value in zip(self.requests.values(), values, strict=True):
            column.append(value)

    def gap_lately_ms(self) -> float:
        """Mean since it was last asked for; 0: there was none."""
        count, total = self._gaps_before
        self._gaps_before = (self.gaps.count, self.gaps.sum)
        return (self.gaps.sum - total) / (self.gaps.count - count) if self.gaps.count > count else 0.0

    def sample(self, time_s: float, values: dict[str, float]) -> None:
        """A point of every series."""
        self._skipped += 1
        if self._skipped <= self._skip:
            return
        self._skipped = 0
        for name, value in {"time_s": time_s, **values}.items():
            self.series.setdefault(name, []).append(value)
        if len(self.series["time_s"]) >= POINTS:
            self.series = {name: points[::2] for name, points in self.series.items()}
            self._skip = 2 * self._skip + 1

    def figures(self) -> dict[str, float]:
        """What requests saw; milliseconds, tokens, and shares of one."""
        ttft, itl = (np.asarray(self.requests[name]) for name in ("ttft_ms", "itl_ms"))
        slo = self._settings
        good = int(((ttft <= slo.ttft_slo_ms) & (itl <= slo.itl_slo_ms)).sum())
        span_s = self.last_arrival_s or 1.0
        gaps = self._scattered_gaps()
        return {
            "requests": self.requests_total,
            "finished": len(ttft),
            "refused": self.refusals,
            "unfinished": self.requests_total - len(ttft) - self.refusals,
            "request_rps": self.requests_total / span_s,
            "goodput_rps": good / span_s,
            "attainment": good / max(1, self.requests_total),
            "ttft_mean_ms": float(ttft.mean()) if len(ttft) else 0.0,
            **_percentiles("ttft", ttft),
            "itl_mean_ms": self.gaps.mean,
            **{f"itl_p{share}_ms": gaps.quantile(share / 100) for share in (50, 90, 99)},
            "itl_request_p90_ms": float(np.percentile(itl, 90)) if len(itl) else 0.0,
            "hit_ratio": self.hit_tokens / max(1, self.began_tokens),
            "prompt_tokens": self.prompt_tokens_total,
            "output_tokens": self.output_tokens_total,
            "fetched_memory_tokens": self.fetched_memory_tokens,
            "fetched_remote_tokens": self.fetched_remote_tokens,
            "placements": self.placements,
            "append_prefills": self.append_prefills,
        }

    def ttft_quantiles_ms(self) -> list[float]:
        ttft = np.asarray(self.requests["ttft_ms"])
        return [float(value) for value in np.percentile(ttft, np.arange(101))] if len(ttft) else []

    def itl_quantiles_ms(self) -> list[float]:
        gaps = self._scattered_gaps()
        return [gaps.quantile(share / 100) for share in range(101)] if gaps.count else []

    def _scattered_gaps(self) -> Histogram:
        """Steps here take what is predicted; real ones are as far off as workers say that their predictions are."""
        rates = self._settings.decode_rates or self._settings.rates
        return self.gaps.scattered(rates.decode_error)


def _percentiles(name: str, values: np.ndarray[Any, np.dtype[np.float64]]) -> dict[str, float]:
    shares = (50, 90, 99)
    found = np.percentile(values, shares) if len(values) else np.zeros(3)
    return {f"{name}_p{share}_ms": float(value) for share, value in zip(shares, found, strict=True)}


def imbalance(loads: Sequence[float]) -> float:
    """The largest over the mean; 1 when there is nothing to compare."""
    mean = sum(loads) / len(loads) if loads else 0.0
    return max(loads) / mean if mean else 1.0

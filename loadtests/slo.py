"""What a run has to keep, from a TOML file, and whether it did; pure.

    [every]                      # holds for every scenario that the run had
    failed = 0.0                 # at most this share of the requests
    within_ttft_ms = 2000        # a request is good when its first token comes in time
    within_tpot_ms = 100         # and the tokens after it come fast enough
    good = 0.9                   # at least this share of the answered requests

    [chat]                       # for one scenario; goes before what `every` says
    ttft_p95_ms = 1500           # at most; ttft, itl, tpot, e2e or late; mean, or p and a percentile
    requests = 50                # at least so many answered
    goodput_rps = 2.0            # at least so many good ones a second
    output_tokens_per_s = 100    # at least

A key that is none of these is an error. A scenario without a single answered request has missed its SLO whatever the
file says, and so has one that is sent by the clock and was not sent in time.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import ConfigError

Limits = dict[str, float]
EVERY = "every"
AT_LEAST = ("good", "goodput_rps", "requests", "output_tokens_per_s")
AT_MOST = re.compile(r"failed|late_share|(ttft|itl|tpot|e2e|late)_(mean|p\d{1,2}(\.\d+)?)_ms")
WITHIN = ("within_ttft_ms", "within_tpot_ms")
ALWAYS: Limits = {"requests": 1, "failed": 0.0}
ON_TIME: Limits = {"late_share": 0.05}  # where requests have times


@dataclass(frozen=True, slots=True)
class Verdict:
    """One limit of one scenario. `measured` is None where nothing was."""

    scenario: str
    limit: str
    wanted: float
    measured: float | None
    kept: bool

    def __str__(self) -> str:
        sign = "at least" if at_least(self.limit) else "at most"
        measured = "nothing was measured" if self.measured is None else f"{self.measured:.4g}"
        return f"{'kept' if self.kept else 'MISSED'} {self.scenario}: {self.limit} {sign} {self.wanted:g}: {measured}"


def at_least(limit: str) -> bool:
    return limit in AT_LEAST or limit == "sent"


def load(path: Path | None, scenarios: Collection[str]) -> dict[str, Limits]:
    """Scenario (or `every`) -> limits; without a file none. Raises ConfigError, also for one that is none of these."""
    if path is None:
        return {}
    try:
        tables = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"SLO file {path} cannot be read: {error}") from error
    for scenario, limits in tables.items():
        if not isinstance(limits, dict):
            raise ConfigError(
                f"SLO file {path}: {scenario!r} stands in no section; write [every] or a scenario above it"
            )
        if scenario not in (EVERY, *scenarios):
            raise ConfigError(f"SLO file {path}: there is no scenario {scenario!r}; there are {', '.join(scenarios)}")
        for key, value in limits.items():
            if not (key in AT_LEAST or key in WITHIN or AT_MOST.fullmatch(key)):
                raise ConfigError(f"SLO file {path}: [{scenario}] has the unknown limit {key!r}; {_known()}")
            if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0:
                raise ConfigError(
                    f"SLO file {path}: {key} of [{scenario}] is {value!r}, which is no number of 0 or more"
                )
    return tables


def _known() -> str:
    at_most = "failed, late_share and {ttft,itl,tpot,e2e,late}_{mean,p50,p95,...}_ms"
    return f"there are {', '.join((*AT_LEAST, *WITHIN))}, {at_most}"


def limits_of(slo: Mapping[str, Limits], scenario: str) -> Limits:
    """All that holds for it, what is said of it alone before what is said of every one."""
    return {**slo.get(EVERY, {}), **slo.get(scenario, {})}


def within(limits: Limits, ttft_s: float, tpot_s: float | None) -> bool:
    """Whether a request was good; without limits every one is."""
    in_time = 1000 * ttft_s <= limits.get("within_ttft_ms", float("inf"))
    return in_time and 1000 * (tpot_s or 0.0) <= limits.get("within_tpot_ms", float("inf"))


def judge(
    slo: Mapping[str, Limits],
    measured: Mapping[str, Mapping[str, float]],
    chosen: Collection[str],
    due: Mapping[str, int],
) -> list[Verdict]:
    """Every limit of every scenario that was chosen, whether or not anything of it was measured.

    `measured` maps scenario -> figure -> value; `due` says how many requests of a scenario had to be sent.
    """
    return [verdict for name in chosen for verdict in _judge(name, slo, measured.get(name, {}), due.get(name))]


def _judge(name: str, slo: Mapping[str, Limits], figures: Mapping[str, float], due: int | None) -> Iterator[Verdict]:
    limits = ALWAYS | (ON_TIME if due is not None else {}) | limits_of(slo, name)
    if due is not None:
        limits["sent"] = due
    for limit, wanted in limits.items():
        closed = due is None and limit.startswith("late") and limit not in slo.get(name, {})
        if limit in WITHIN or closed:  # where users wait for answers nothing has a time to be late for
            continue
        value = figures.get(limit)
        kept = value is not None and (value >= wanted if at_least(limit) else value <= wanted)
        yield Verdict(name, limit, wanted, value, kept)

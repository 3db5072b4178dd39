"""The options that a load test has besides Locust's own, and what follows from them.

They are parsed by Locust, so each is also an environment variable where Locust has one, and workers on other machines
are told the master's. The server's key comes from OPENAI_API_KEY alone, so that it is in no process list and no report.
"""

from __future__ import annotations

import json
import os
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.errors import ConfigError
from loadtests.simulator.generators import read
from loadtests.simulator.trace import Trace
from loadtests.simulator.transform import resized

# scenario -> the traffic of the simulator that arrives whatever the server does
ARRIVALS = {
    "burst": "gamma:rate={rate},cv=4,seconds={seconds},input=400,output=64,spread=0.5,seed={seed}",
    "square": "square:rate={rate},rate2={rate},period={half},seconds={seconds},input=1200,output=16,input2=100,"
    "output2=128,spread=0.3,seed={seed}",
    "diurnal": "diurnal:rate={rate},peak=1.8,period={seconds},seconds={seconds},input=400,output=64,spread=0.5,"
    "seed={seed}",
    "trace": "{trace}",
}
PERIODS = 3  # of the square wave in a run


def add_arguments(parser: Any) -> None:
    """Register them with Locust's parser."""
    group = parser.add_argument_group("Load test of a language model")
    group.add_argument("--model", default="", help="name to ask for [default: the first that the server lists]")
    group.add_argument("--seed", type=int, default=0, help="of every prompt, length and pause")
    group.add_argument("--length", type=float, default=1.0, help="times the length of every prompt and answer")
    group.add_argument("--warmup", type=float, default=0.0, help="seconds at the beginning that are not counted")
    group.add_argument("--request-timeout", type=float, default=600.0, help="longest life of a request in seconds")
    group.add_argument("--extra", default="{}", help="""fields for every request, such as '{"ignore_eos": true}'""")
    group.add_argument("--trace", default="", help="what TraceUser replays: a file, or a text such as agents:rate=2")
    group.add_argument("--vocab", type=int, default=30_000, help="token ids of a replay are below that")
    group.add_argument("--rate", type=float, default=2.0, help="requests a second of bursts, square wave and day")
    group.add_argument("--seconds", type=float, default=60.0, help="that these three last")
    group.add_argument("--slo", default="", help="TOML file of limits; a limit that is missed makes the exit code 1")
    group.add_argument("--out", default="results/loadtest", help="folder of the report and the JSON of its figures")
    group.add_argument("--label", default="", help="of this run in reports [default: its scenarios]")


@dataclass(frozen=True, slots=True)
class Options:
    """The same, checked."""

    url: str
    model: str
    seed: int
    length: float
    warmup_s: float
    timeout_s: float
    extra: dict[str, Any]
    trace: str
    vocab: int
    rate: float
    seconds: float
    slo: Path | None
    out: Path
    label: str

    @property
    def key(self) -> str:
        return os.environ.get("OPENAI_API_KEY", "")

    def arrivals(self, scenario: str) -> Trace:
        """What arrives in a scenario of ARRIVALS, at its length. Raises ConfigError."""
        if scenario == "trace" and not self.trace:
            raise ConfigError("TraceUser has nothing to replay; give a file or a text with --trace")
        text = ARRIVALS[scenario].format(
            rate=self.rate, seconds=self.seconds, half=self.seconds / PERIODS, seed=self.seed, trace=self.trace
        )
        trace = read(text)
        return resized(trace, max(1, round(trace.block_size * self.length)), self.length)

    def settings(self) -> dict[str, Any]:
        """For a report: what decides the load."""
        names = ("seed", "length", "warmup_s", "extra", "trace", "rate", "seconds")
        return {name: getattr(self, name) for name in names}


def options(host: str | None, parsed: Namespace) -> Options:
    """Raises ConfigError."""
    if not host:
        raise ConfigError("which server? give its address with --host http://...")
    try:
        extra = json.loads(parsed.extra)
    except ValueError as error:
        raise ConfigError(f"--extra {parsed.extra!r} is not JSON ({error})") from error
    if not isinstance(extra, dict):
        raise ConfigError(f"--extra {parsed.extra!r} is no JSON object")
    for name in ("length", "rate", "seconds", "request_timeout"):
        if getattr(parsed, name) <= 0:
            raise ConfigError(f"--{name.replace('_', '-')} has to be above 0")
    return Options(
        host, parsed.model, parsed.seed, parsed.length, parsed.warmup, parsed.request_timeout, extra, parsed.trace,
        parsed.vocab, parsed.rate, parsed.seconds, Path(parsed.slo) if parsed.slo else None, Path(parsed.out),
        parsed.label,
    )  # fmt: skip

"""One row: a deployment on the GPU, as its clients see it. Needs everything that `tandem serve` needs, Ray included."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from deploy.bench.cuda.limits import Limits
from deploy.bench.cuda.rows import Answer
from deploy.bench.deployed import deployed
from deploy.bench.serve import stream
from deploy.models import resolve

PROMPT, NEW = 512, 64  # tokens
REQUESTS = 8  # one after another, after one that warms up
SETTINGS = {"runner": "cuda", "prefill": 0, "decode": 1}


@dataclass(frozen=True, slots=True)
class Served:
    name: str = f"served: the demo model, {PROMPT} tokens in and {NEW} out"
    moved: float = 0.0
    flop: float = 0.0

    def compile(self) -> None:
        """It launches nothing that the engine's rows do not."""

    def run(self, limits: Limits) -> Answer:
        directory = resolve("", lambda fraction: None).directory
        times = []
        with deployed(directory, "bfloat16", SETTINGS) as server:
            for _ in range(REQUESTS + 1):
                times.append(stream(server.url, random.choices(range(100, 30_000), k=PROMPT), NEW))
        first = 1e3 * statistics.median(t[0] for t in times[1:])
        gap = 1e3 * statistics.median((t[-1] - t[0]) / (len(t) - 1) for t in times[1:])
        return {"us": 1e3 * gap, "detail": f"time to first token {first:.1f} ms, then a token every {gap:.2f} ms"}


def rows() -> Sequence[Served]:
    return [Served()]

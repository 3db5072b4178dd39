"""The simulator against the real thing: one trace, served by a real deployment and simulated, and how far they differ.

The simulator is given what the workers themselves say that their steps take, averaged over the run, and two constants
that are measured beforehand, one request at a time: what a step takes beyond what the engine counts as the step, and
what a first token takes beyond its prefill (HTTP, tokenizing, placement, frames). Nothing is fitted to the run itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cluster.config import Config
from cluster.errors import StartupError
from cluster.messages import Rates
from cluster.perfmodel import decode_ms, prefill_ms
from deploy.bench.deployed import deployed, rates, status
from deploy.bench.report import Figure
from deploy.bench.serve import stream
from loadtests.replay import Outcome, prompt, replay, summary
from loadtests.simulator.generators import generate
from loadtests.simulator.settings import SimSettings
from loadtests.simulator.simulation import simulate
from loadtests.simulator.trace import Trace
from loadtests.simulator.transform import faster, limit
from workers.architecture import layout as model_layout
from workers.architecture import load_architecture

REQUESTS, ALONE = 200, 24  # in the trace; before it, one at a time
INPUT, OUTPUT = 160, 24  # tokens, on average
TRAFFIC = f"poisson:rate=1,input={INPUT},output={OUTPUT},spread=0.6,seconds=2000"
LOAD = 0.5  # part of the time that the trace keeps the worker busy that prefills
BATCHED = 3  # sequences that share a decode step then
POLL_S = 0.5
PREFILLS, DECODES = ("both-0", "prefill-0"), ("both-0", "decode-0")  # by the number of prefill workers
NAMES = {
    "ttft_mean_ms": "mean TTFT",
    "ttft_p90_ms": "P90 of TTFT",
    "itl_mean_ms": "mean ITL",
    "itl_p90_ms": "P90 of ITL",
    "itl_request_p90_ms": "P90 of requests' mean ITL",
}


@dataclass(frozen=True, slots=True)
class Overheads:
    """In milliseconds."""

    step: float  # between two steps
    first_token: float


def measure(model: Path, config: Config) -> list[Figure]:
    """Raises StartupError when a request fails."""
    figures: list[Figure] = []
    for name, prefill in (("1 + 1", 1), ("aggregated", 0)):
        settings = {"prefill": prefill, "decode": 1, "threads": 1, "autoscaling": "fixed"}
        trace, alone = (
            limit(generate(f"{TRAFFIC},block={config.block_size},seed={seed}"), count)
            for seed, count in ((1, REQUESTS), (2, ALONE))
        )
        with deployed(model, config.dtype, settings) as server:
            overheads = _overheads(server.url, alone, prefill)
            trace = faster(trace, _rate(_slower(rates(server.url)[PREFILLS[prefill]], overheads.step), prefill))
            outcomes, reported = asyncio.run(_replayed(trace, server.url))
            blocks = status(server.url)["workers"][0]["kv_blocks"]
        sim = _settings(model, config, prefill, blocks, reported, overheads)
        figures += _compared(name, outcomes, simulate(trace.requests, sim).figures, overheads)
    return figures


def _overheads(url: str, trace: Trace, prefill: int) -> Overheads:
    prompts = [prompt(request, trace.block_size) for request in trace.requests]
    times = [stream(url, p, r.output_tokens) for p, r in zip(prompts, trace.requests, strict=True)]
    said = rates(url)
    prefiller, decoder = said[PREFILLS[prefill]], said[DECODES[prefill]]
    gaps = [
        1000 * statistics.mean(b - a for a, b in itertools.pairwise(t[1:]))
        - decode_ms(decoder, 1, len(p) + len(t) // 2)
        for p, t in zip(prompts, times, strict=True)
        if len(t) > 3
    ]
    step = max(0.0, statistics.median(gaps))
    firsts = [
        1000 * t[0] - prefill_ms(_slower(prefiller, step), len(p), 0) for p, t in zip(prompts, times, strict=True)
    ]
    return Overheads(step, statistics.median(firsts))


def _rate(said: Rates, prefill: int) -> float:
    """Requests a second that make that load."""
    busy_ms = prefill_ms(said, INPUT, 0)
    if not prefill:
        busy_ms += OUTPUT * decode_ms(said, BATCHED, BATCHED * INPUT) / BATCHED
    return LOAD * 1000 / busy_ms


def _slower(said: Rates, step_ms: float) -> Rates:
    """The same worker with that much more for every step."""
    prefill, decode = said.prefill, said.decode
    return replace(
        said,
        prefill=(prefill[0] + step_ms, prefill[1], prefill[2]),
        decode=(decode[0] + step_ms, decode[1], decode[2]),
    )


async def _replayed(trace: Trace, url: str) -> tuple[list[Outcome], dict[str, Rates]]:
    """What came of the requests, and what the workers said meanwhile, on average."""
    said: dict[str, list[Rates]] = {}

    async def listen() -> None:
        while True:
            await asyncio.sleep(POLL_S)
            for worker, value in (await asyncio.to_thread(rates, url)).items():
                said.setdefault(worker, []).append(value)

    listening = asyncio.create_task(listen())
    outcomes = await replay(trace, url)
    listening.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await listening
    if failed := [outcome.error for outcome in outcomes if outcome.error]:
        raise StartupError(f"{len(failed)} requests failed, the first with {failed[0]}; is the machine busy?")
    return outcomes, {worker: _mean(values) for worker, values in said.items()}


def _mean(values: Sequence[Rates]) -> Rates:
    """The mean of linear predictions has the mean coefficients."""

    def over(name: str) -> Any:
        return tuple(map(statistics.mean, zip(*(getattr(value, name) for value in values), strict=True)))

    return replace(values[-1], **{name: over(name) for name in ("prefill", "decode", "memory", "disk", "remote")})


def _settings(
    model: Path, config: Config, prefill: int, blocks: int, reported: dict[str, Rates], overheads: Overheads
) -> SimSettings:
    slower = {worker: _slower(said, overheads.step) for worker, said in reported.items()}
    return SimSettings(
        rates=slower[PREFILLS[prefill]],
        decode_rates=slower[DECODES[prefill]] if prefill else None,
        block_size=config.block_size,
        workers=prefill + 1,
        prefill=prefill,
        kv_tokens=blocks * config.block_size,
        kv_bytes=model_layout(load_architecture(model), config.dtype, config.block_size).token_bytes,
        max_sequences=config.max_sequences,
        max_queue=config.max_queue,
    )


def _compared(name: str, outcomes: list[Outcome], simulated: dict[str, float], overheads: Overheads) -> list[Figure]:
    real = summary(outcomes)
    figures = [
        Figure("fidelity", f"{name}: a step beyond the engine's", overheads.step, "ms"),
        Figure("fidelity", f"{name}: a first token beyond its prefill", overheads.first_token, "ms"),
    ]
    for key, words in NAMES.items():
        # the engine's frames and the client are in the constant; the simulated router and network take no time
        said = simulated[key] + (overheads.first_token if key.startswith("ttft") else 0.0)
        figures += [
            Figure("fidelity", f"{name}: {words}, served", real[key], "ms", lower_is_better=True),
            Figure("fidelity", f"{name}: {words}, simulated", said, "ms", lower_is_better=True),
            Figure("fidelity", f"{name}: {words}, simulated off by", 100 * (said / real[key] - 1), "%"),
        ]
    return figures

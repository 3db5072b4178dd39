"""Who computes the prompt of a conversation's next turn: a prefill worker, or the decode worker that has its KV?

After PPD (arXiv:2603.13358): Llama-3-8B on four H100, two workers that prefill and two that decode. "Split" sends every
prompt to a prefill worker; "append" sends every later turn to the decode worker with most of it, which computes what is
new beside the sequences it decodes; "least time" (what the router does) weighs the two each time; "aggregated" is four
workers that do both. "Nothing kept" computes the whole conversation again for every turn; otherwise a prefill worker
has the prompts that it computed, and the answers that others decoded only where there are stores.
Conversations are closed loops: a turn comes some time after the answer before it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import count, islice
from typing import Annotated, Any

import numpy as np
import typer

from loadtests.experiments.runs import (
    HtmlOption,
    JsonOption,
    LimitOption,
    Results,
    Row,
    SeedOption,
    TraceOption,
    command,
    finish,
    settings,
    trace_of,
)
from loadtests.simulator.simulation import simulate
from loadtests.simulator.trace import Trace
from loadtests.simulator.transform import at_rate
from router.costs import Costs
from router.policies import POLICIES, Eligible, Pair

STORE = 1_000_000  # tokens of KV on the node: room for every conversation that goes on
NOTHING_KEPT = "split, nothing kept"
RATES = [5.0, 10.0, 20.0, 30.0]
COLUMNS = ("turn", "ttft_ms", "arrival_s", "finish_s")
WAYS: dict[str, dict[str, Any]] = {
    NOTHING_KEPT: {"placement": "always_split"},
    "split": {"placement": "always_split"},
    "append": {"placement": "always_append"},
    "least time": {},
    "aggregated": {"prefill": 0},
    "split, stores": {"placement": "always_split", "store_tokens": STORE},
    "append, stores": {"placement": "always_append", "store_tokens": STORE},
    "least time, stores": {"store_tokens": STORE},
}


def always_split(costs: Costs, eligible: Eligible, rng: random.Random) -> tuple[Pair, None]:
    """The best pair of a prefill and a decode worker, whatever the decode worker could do alone."""
    prefill, decode = eligible.prefill, eligible.decode
    totals = costs.prompt[prefill, None] + costs.handoff(prefill, decode) + costs.output[decode]
    best, at = divmod(int(totals.argmin()), decode.size)
    return (int(prefill[best]), int(decode[at])), None


def always_append(costs: Costs, eligible: Eligible, rng: random.Random) -> tuple[Pair, None]:
    """The decode worker with most of the prompt; the best pair for what no decode worker has anything of."""
    known = costs.device[eligible.decode]
    return ((None, int(eligible.decode[known.argmax()])), None) if known.any() else always_split(costs, eligible, rng)


def ppd(trace: Trace, rates: Sequence[float], seconds: float, seed: int) -> tuple[list[Row], Results]:
    rows, results = [], []
    for rate in rates:
        more = ways(at_rate(trace, rate, seconds, seed), seed)
        rows += more[0]
        results += more[1]
    return rows, results


@contextmanager
def _extremes() -> Iterator[None]:
    """Two more policies beside the router's."""
    extremes = {"always_split": always_split, "always_append": always_append}
    POLICIES.update(extremes)
    try:
        yield
    finally:
        for name in extremes:
            del POLICIES[name]


@_extremes()
def ways(trace: Trace, seed: int) -> tuple[list[Row], Results]:
    rows, results = [], []
    for name, changes in WAYS.items():
        fields = {"prefill": 2, "seed": seed} | changes
        arriving = _unrelated(trace) if name == NOTHING_KEPT else trace
        result = simulate(arriving.requests, settings(trace, "Llama-3-8B", "H100", "bfloat16", 1, 4, **fields))
        figures = result.figures
        results.append({"name": f"{name} at {figures['request_rps']:.0f}/s", **result.to_json()})
        turn, ttft, arrival, finish = (np.asarray(result.requests[column]) for column in COLUMNS)
        later = ttft[turn > 0]
        answer = 1000 * (finish - arrival)[turn > 0]
        rows.append(
            {
                "requests (1/s)": figures["request_rps"],
                "later turns": name,
                "turn 1 TTFT mean (ms)": float(ttft[turn == 0].mean()),
                "turn 2+ TTFT mean (ms)": float(later.mean()),
                "turn 2+ TTFT P99 (ms)": float(np.percentile(later, 99)),
                "ITL mean (ms)": figures["itl_mean_ms"],
                "ITL P99 (ms)": figures["itl_p99_ms"],
                "turn 2+ answered (ms)": float(answer.mean()),
                "appended (%)": 100 * figures["append_prefills"] / figures["placements"],
            }
        )
    return rows, results


def _unrelated(trace: Trace) -> Trace:
    """The same requests without a block in common."""
    fresh = count()
    return replace(
        trace,
        requests=tuple(
            r._replace(blocks=tuple(islice(fresh, len(r.blocks))), output_blocks=()) for r in trace.requests
        ),
    )


def main(
    trace: TraceOption,
    limit: LimitOption = 0,
    rate: Annotated[list[float], typer.Option(help="requests a second; may be repeated")] = RATES,
    seconds: Annotated[float, typer.Option(help="of the trace, at each rate")] = 300.0,
    seed: SeedOption = 0,
    json: JsonOption = None,
    html: HtmlOption = None,
) -> None:
    rows, results = ppd(trace_of(trace, limit), rate, seconds, seed)
    finish("who computes a conversation's next turn: Llama-3-8B, four H100", rows, results, json, html)


if __name__ == "__main__":
    command(main)

"""What a cache of a size is worth: the hit ratio against its capacity, alone and spread over a cluster's stores.

After Mooncake's cache analysis (FAST'25; table 1 of its technical report). "One cache" is a single pool with least-
recently-used eviction that every request looks into, which is the most that the capacity allows; "stores" is the same
capacity divided among the nodes of a cluster that serves the trace, in addition to what devices hold.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

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
    run,
    settings,
    trace_of,
)
from loadtests.simulator.trace import Trace
from loadtests.simulator.traffic import traffic

CAPACITIES = (0, 1_000_000, 3_000_000, 10_000_000, 30_000_000, 100_000_000)  # tokens of KV
DEVICE = 300_000  # tokens of KV on a device: little more than what runs there needs
FAST = 1e-3  # of a worker's times, so that requests do not meet and the cache alone decides


def cache(trace: Trace, prefill: int, decode: int, seed: int) -> tuple[list[Row], Results]:
    workers = prefill + decode
    cluster = settings(trace, "Llama-3-70B", "A100", "bfloat16", 8, workers, prefill, seed=seed, kv_tokens=DEVICE)
    highest = traffic(trace).hit_ratio
    results, rows = [], []
    for capacity in CAPACITIES:
        result = run(f"{capacity:,} tokens", trace, replace(cluster, store_tokens=capacity // workers))
        results.append(result)
        alone = _one_cache(trace, max(DEVICE, capacity), seed)
        rows.append(
            {
                "capacity (tokens)": capacity,
                "one cache, hit (%)": 100 * alone,
                "of all possible (%)": 100 * alone / highest,
                "stores, hit (%)": 100 * result["hit_ratio"],
                "TTFT mean (s)": result["ttft_mean_ms"] / 1000,
                "prompt tokens fetched (%)": 100
                * (result["fetched_memory_tokens"] + result["fetched_remote_tokens"])
                / result["prompt_tokens"],
            }
        )
    return rows, results


def _one_cache(trace: Trace, capacity: int, seed: int) -> float:
    """The hit ratio of a worker that is in nobody's way."""
    how = settings(trace, "Llama-3-70B", "A100", "bfloat16", 8, 1, 0, seed=seed, kv_tokens=capacity)
    (step, token, pair), (decode, sequence, context) = how.rates.prefill, how.rates.decode
    fast = replace(
        how.rates,
        prefill=(FAST * step, FAST * token, FAST * pair),
        decode=(FAST * decode, FAST * sequence, FAST * context),
    )
    return float(run("one cache", trace, replace(how, rates=fast))["hit_ratio"])


def main(
    trace: TraceOption,
    prefill: Annotated[int, typer.Option(help="prefill workers of the cluster")] = 5,
    decode: Annotated[int, typer.Option(help="decode workers")] = 3,
    limit: LimitOption = 0,
    seed: SeedOption = 0,
    json: JsonOption = None,
    html: HtmlOption = None,
) -> None:
    rows, results = cache(trace_of(trace, limit), prefill, decode, seed)
    finish("hit ratio against cache size", rows, results, json, html)


if __name__ == "__main__":
    command(main)

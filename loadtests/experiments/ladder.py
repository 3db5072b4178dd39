"""The more the router knows, the sooner the first token: random >> least loaded > local prefixes > all prefixes.

After Mooncake's scheduling experiment (FAST'25, figure 5 of its technical report): Llama-3-70B in bfloat16 on nodes of
eight A100, one worker a node. "Local" workers hit what they have on their device; "global" ones also what any node's
store has. A node's store holds three million tokens there; a local row with as much on the device tells what of the
gain is room and what is sharing.
"""

from __future__ import annotations

from typing import Annotated, Any

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

STORE = 3_000_000  # tokens of KV: about one terabyte of memory
RUNGS: dict[str, dict[str, Any]] = {
    "random": {"placement": "random"},
    "least loaded": {"placement": "least_loaded"},
    "local prefixes": {},
    "local, more room": {"kv_tokens": STORE},
    "global prefixes": {"store_tokens": STORE},
}


def ladder(trace: Trace, prefill: int, decode: int, seed: int) -> tuple[list[Row], Results]:
    results, rows = [], []
    for name, changes in RUNGS.items():
        how = settings(trace, "Llama-3-70B", "A100", "bfloat16", 8, prefill + decode, prefill, seed=seed, **changes)
        result = run(name, trace, how)
        results.append(result)
        rows.append(
            {
                "scheduler": name,
                "TTFT mean (s)": result["ttft_mean_ms"] / 1000,
                "TTFT P90 (s)": result["ttft_p90_ms"] / 1000,
                "hit (%)": 100 * result["hit_ratio"],
                "load max/mean": result["load_max_over_mean"],
                "times the first": result["ttft_mean_ms"] / results[0]["ttft_mean_ms"],
            }
        )
    return rows, results


def main(
    trace: TraceOption,
    prefill: Annotated[int, typer.Option(help="prefill workers")] = 5,
    decode: Annotated[int, typer.Option(help="decode workers")] = 3,
    limit: LimitOption = 0,
    seed: SeedOption = 0,
    json: JsonOption = None,
    html: HtmlOption = None,
) -> None:
    rows, results = ladder(trace_of(trace, limit), prefill, decode, seed)
    finish("scheduler ladder", rows, results, json, html)


if __name__ == "__main__":
    command(main)

"""What separate pools are worth as the ITL SLO tightens: goodput per GPU of disaggregated over aggregated serving.

After DistServe (OSDI'24) and Splitwise (ISCA'24), whose baselines computed prompts whole ("gain over whole prompts"),
and with one that they did not have: chunked prefill (Sarathi-Serve, OSDI'24) with the best of several chunks ("gain").
Everybody has the same prefix-aware router. Goodput is the highest rate at which nine requests in ten meet both SLOs; a
request's ITL is the mean of its gaps, as in DistServe.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated

import typer

from loadtests.experiments.runs import (
    HtmlOption,
    JsonOption,
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

ATTAINMENT = 0.9
ITL_SLOS_MS = (200.0, 100.0, 75.0, 50.0, 40.0, 30.0, 25.0, 20.0)
CHUNKS = (512, 1024, 2048)  # tokens of a step
WHOLE = 32_768  # ... in which almost every prompt fits
DRAWN_MS = 30.0  # the ITL SLO of the page's drawing
RATES = (0.25, 0.4, 0.55, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.35, 1.5, 1.75, 2.0, 2.5)  # per worker and second
Curve = list[tuple[float, dict[float, float]]]  # (rate, ITL SLO -> attainment), by rate


def disaggregation(
    trace: Trace, model: str, gpu: str, dtype: str, tp: int, workers: int, ttft_slo_s: float, seconds: float, seed: int
) -> tuple[list[Row], Results]:
    results: Results = []
    traces = [(workers * rate, at_rate(trace, workers * rate, seconds, seed)) for rate in RATES]

    def curve(name: str, prefill: int, chunk: int) -> Curve:
        points: Curve = []
        for rate, arriving in traces:
            how = settings(
                arriving, model, gpu, dtype, tp, workers, prefill, seed=seed, step_tokens=chunk, max_sequences=256,
                ttft_slo_ms=1000 * ttft_slo_s, itl_slo_ms=ITL_SLOS_MS[0],
            )  # fmt: skip
            result = simulate(arriving.requests, how)
            met = [
                itl for ttft, itl in zip(result.requests["ttft_ms"], result.requests["itl_ms"], strict=True)
                if ttft <= 1000 * ttft_slo_s
            ]  # fmt: skip
            asked = len(arriving.requests)
            points.append((rate, {slo: sum(itl <= slo for itl in met) / asked for slo in ITL_SLOS_MS}))
            good = {"request_rps": rate, "goodput_rps": rate * points[-1][1][DRAWN_MS]}
            results.append({"name": f"{name} at {rate:.1f}/s", "curve": name, **result.figures, **good})
            if max(points[-1][1].values()) < ATTAINMENT / 2:
                break  # more would only be worse
        return points

    aggregated = {f"{chunk:,}": curve(f"aggregated, chunks of {chunk}", 0, chunk) for chunk in CHUNKS}
    splits = {f"{p} + {workers - p}": curve(f"{p} prefill + {workers - p} decode", p, 2048) for p in range(1, workers)}
    whole = curve("aggregated, whole prompts", 0, WHOLE)
    return [_row(slo, aggregated, whole, splits, workers * tp) for slo in ITL_SLOS_MS], results


def _row(slo_ms: float, aggregated: dict[str, Curve], whole: Curve, splits: dict[str, Curve], gpus: int) -> Row:
    together, chunk = max((goodput(curve, slo_ms), name) for name, curve in aggregated.items())
    unchunked = goodput(whole, slo_ms)
    apart, split = max((goodput(curve, slo_ms), name) for name, curve in splits.items())
    return {
        "ITL SLO (ms)": slo_ms,
        "aggregated (1/s/GPU)": together / gpus,
        "best chunk": chunk if together else "none",
        "disaggregated (1/s/GPU)": apart / gpus,
        "best split": split if apart else "none",
        "gain": apart / together if together else None,
        "gain over whole prompts": apart / unchunked if unchunked else None,
    }


def goodput(curve: Curve, slo_ms: float) -> float:
    """The highest rate at which the SLO is attained, interpolated; 0: at none of them."""
    points = [(rate, attained[slo_ms]) for rate, attained in curve]
    best = 0.0
    for (rate, attained), (faster, less) in pairwise([*points, (points[-1][0], 0.0)]):
        if attained >= ATTAINMENT:
            best = rate + (faster - rate) * min(1.0, (attained - ATTAINMENT) / max(1e-9, attained - less))
    return best


def main(
    trace: TraceOption,
    model: Annotated[str, typer.Option()] = "Llama-3-70B",
    gpu: Annotated[str, typer.Option()] = "H100",
    dtype: Annotated[str, typer.Option()] = "fp8",
    tp: Annotated[int, typer.Option()] = 4,
    workers: Annotated[int, typer.Option(help="workers in all")] = 6,
    ttft_slo: Annotated[float, typer.Option(help="seconds")] = 10.0,
    seconds: Annotated[float, typer.Option(help="of the trace, at each rate")] = 240.0,
    seed: SeedOption = 0,
    json: JsonOption = None,
    html: HtmlOption = None,
) -> None:
    rows, results = disaggregation(trace_of(trace, 0), model, gpu, dtype, tp, workers, ttft_slo, seconds, seed)
    finish(f"goodput against the ITL SLO: {model} {dtype}, {workers} workers of {tp} {gpu}", rows, results, json, html)


if __name__ == "__main__":
    command(main)

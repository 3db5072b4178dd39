"""`tandem plan`: which deployment of a model is the cheapest that keeps its promise on a trace; nothing is started.

Every candidate (aggregated or disaggregated, with each tensor and pipeline parallelism that the model fits in) is sized
by loadtests/simulator/search.py and measured by the simulator, so its answers are as good as the roofline's rates are.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from cluster.errors import StartupError
from deploy.terminal import console, fail
from loadtests.simulator import report
from loadtests.simulator.generators import read
from loadtests.simulator.hardware import STEP_TOKENS, Shape, Speed, speed
from loadtests.simulator.search import Pools, cheapest, matched
from loadtests.simulator.settings import SimSettings
from loadtests.simulator.simulation import simulate
from loadtests.simulator.trace import Trace
from loadtests.simulator.traffic import Traffic, traffic
from loadtests.simulator.transform import limit as first
from loadtests.simulator.transform import superpose

NODE_GPUS = 8
WIDE = 130  # characters, so that a command can be pasted
Results = dict[Pools, dict[str, Any]]


def plan(
    trace: Annotated[str, typer.Option(help="a trace file, or a text such as poisson:rate=5,input=1000")],
    model: Annotated[str, typer.Option(help="Llama-3-8B, Llama-3-70B or Qwen3-32B")] = "Llama-3-70B",
    gpu: Annotated[str, typer.Option(help="A10G, A100, B200, H100, H20, H200, L4 or L40S")] = "H100",
    dtype: Annotated[str, typer.Option(help="of the weights: bfloat16 or fp8")] = "bfloat16",
    ttft_slo: Annotated[float, typer.Option(min=0.001, help="seconds")] = 5.0,
    itl_slo: Annotated[float, typer.Option(min=0.001, help="seconds")] = 0.05,
    attainment: Annotated[float, typer.Option(min=0, max=1, help="share of the requests within both SLOs")] = 0.9,
    gpus: Annotated[int, typer.Option(min=1, help="at most")] = 512,
    tp: Annotated[str, typer.Option(help="tensor parallelism to try")] = "1,2,4,8",
    pp: Annotated[str, typer.Option(help="pipeline stages to try")] = "1",
    placement: Annotated[str, typer.Option(help="policies to try")] = "least_time",
    store_tokens: Annotated[int, typer.Option(min=0, help="room for KV in each node's store")] = 0,
    copies: Annotated[int, typer.Option(min=1, help="of the trace, one over the other: its rate times that")] = 1,
    limit: Annotated[int, typer.Option(min=0, help="only the first so many requests; 0: all")] = 3000,
    seed: Annotated[int, typer.Option()] = 0,
    json: Annotated[Path | None, typer.Option(help="write what was found there")] = None,
    html: Annotated[Path | None, typer.Option(help="write a page with plots there")] = None,
) -> None:
    """Search the cheapest deployment (pool sizes, tp and pp, policy) that meets the SLOs on a trace."""
    try:
        arriving = superpose(read(trace), copies, seed) if copies > 1 else read(trace)
        arriving = first(arriving, limit) if limit else arriving
        shapes = [Shape(*numbers) for numbers in product(_numbers("tp", tp), _numbers("pp", pp))]
        speeds = {shape: speed(model, gpu, shape, dtype) for shape in shapes}
        names = [name.strip() for name in placement.split(",")]
        common = {
            "block_size": arriving.block_size, "ttft_slo_ms": 1000 * ttft_slo, "itl_slo_ms": 1000 * itl_slo,
            "store_tokens": store_tokens, "seed": seed,
        }  # fmt: skip
        found, results = _search(arriving, speeds, names, common, attainment, gpus)
        if not found:
            _nothing(model, gpu, speeds, traffic(arriving), gpus)
        _show(
            f"{model} {dtype} on {gpu}, {arriving.rate:.1f} requests/s of {arriving.name}", found, results, json, html
        )
    except StartupError as error:
        fail(error.message)


def _search(
    trace: Trace, speeds: dict[Shape, Speed], placements: list[str], common: dict[str, Any], share: float, gpus: int
) -> tuple[list[Pools], Results]:
    """What was found, cheapest first, and what the simulator said of all that was tried."""
    results: Results = {}

    def measure(pools: Pools) -> float:
        console.print(f"  {pools.gpus} GPUs: {pools.command}", style="dim", highlight=False, soft_wrap=True)
        result = simulate(trace.requests, _settings(pools, speeds, common)).to_json()
        results[pools] = result
        return float(result["attainment"])

    asked = traffic(trace)
    candidates = list(_candidates(asked, speeds, placements, common["itl_slo_ms"]))
    return [found.pools for found in cheapest(candidates, measure, share, gpus)], results


def _candidates(
    asked: Traffic, speeds: dict[Shape, Speed], placements: list[str], itl_ms: float
) -> Iterator[tuple[Pools, tuple[float, float]]]:
    for placement in placements:
        for (prefill, one), (decode, other) in product(speeds.items(), repeat=2):
            if shares := matched(asked, one, other, itl_ms):
                yield Pools(1, 1, prefill, decode, placement), shares
                if prefill == decode:
                    yield Pools(0, 1, prefill, decode, placement), shares


def _settings(pools: Pools, speeds: dict[Shape, Speed], common: dict[str, Any]) -> SimSettings:
    """`kv_tokens` is one number there, so it is the smaller pool's room."""
    prefill, decode = speeds[pools.prefill_shape], speeds[pools.decode_shape]
    return SimSettings(
        rates=prefill.rates,
        decode_rates=decode.rates,
        workers=pools.prefill + pools.decode,
        prefill=pools.prefill,
        shards=(pools.prefill_shape.gpus, pools.decode_shape.gpus),
        kv_tokens=min(prefill.kv_tokens, decode.kv_tokens),
        kv_bytes=decode.kv_bytes,
        workers_per_node=max(1, NODE_GPUS // max(pools.prefill_shape.gpus, pools.decode_shape.gpus)),
        placement=pools.placement,
        **common,
    )


def _show(title: str, found: list[Pools], results: Results, json: Path | None, html: Path | None) -> None:
    rows = [
        {
            "GPUs": pools.gpus,
            "prefill": f"{pools.prefill} x {pools.prefill_shape}" if pools.prefill else "",
            "decode": f"{pools.decode} x {pools.decode_shape}",
            "within SLO (%)": 100 * results[pools]["attainment"],
            "TTFT P90 (s)": results[pools]["ttft_p90_ms"] / 1000,
            "ITL mean (ms)": results[pools]["itl_mean_ms"],
            "serve it with": pools.command,
        }
        for pools in found
    ]
    report.show_rows(title, rows, Console(width=max(WIDE, console.width)))
    console.print(f"{len(results)} deployments simulated", highlight=False)
    if json:
        report.write_json({"title": title, "found": rows, "step_tokens": STEP_TOKENS}, json)
    if html:
        report.write_html([{"name": pools.command, **results[pools]} for pools in found], html, title)


def _nothing(model: str, gpu: str, speeds: dict[Shape, Speed], asked: Traffic, gpus: int) -> None:
    if all(speed.kv_tokens < asked.longest for speed in speeds.values()):
        fail(f"{model} and one request of {asked.longest:,} tokens fit no worker of {gpu}; allow a larger --tp or --pp")
    fail(f"nothing up to {gpus} GPUs meets these SLOs; allow more --gpus, another --tp, or longer SLOs")


def _numbers(name: str, text: str) -> list[int]:
    try:
        numbers = [int(number) for number in text.split(",")]
    except ValueError:
        fail(f"--{name} {text}: numbers with commas between them are wanted, as 1,2,4")
    if any(number < 1 for number in numbers):
        fail(f"--{name} {text}: the numbers are 1 or more")
    return numbers

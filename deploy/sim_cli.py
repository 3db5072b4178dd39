"""`tandem simulate`: a trace through a simulated cluster of any size, in virtual time on one core.

It gathers options into settings and requests; what happens is `loadtests/simulator/`'s, what is shown is its report's.
Scaling a trace up superposes copies of it, because compressing time would make caches look larger than they are.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer

from cluster.errors import ConfigError, TandemError
from cluster.messages import Rates
from cluster.perfmodel import PRIOR
from deploy.terminal import console, fail
from loadtests.simulator import report
from loadtests.simulator.generators import help_text, read
from loadtests.simulator.hardware import Shape, speed
from loadtests.simulator.load import copies_for, scaled, work
from loadtests.simulator.settings import SimSettings
from loadtests.simulator.simulation import simulate as run
from loadtests.simulator.trace import Trace, TraceRequest
from loadtests.simulator.transform import faster, superpose

NODE_GPUS = 8


def simulate(
    trace: Annotated[str, typer.Option(help=f"a trace file, or: {help_text()}")],
    workers: Annotated[int, typer.Option(help="of all roles")] = 8,
    prefill: Annotated[int | None, typer.Option(help="of them for prompts only [default: as the trace needs]")] = None,
    decode: Annotated[int | None, typer.Option(help="of them for answers only; with --prefill, both are all")] = None,
    aggregated: Annotated[bool, typer.Option(help="every worker prefills and decodes")] = False,
    placement: Annotated[str, typer.Option(help="least_time, round_robin, random, ...")] = "least_time",
    limit: Annotated[int, typer.Option(help="only the first so many requests; 0: all")] = 0,
    seed: Annotated[int, typer.Option()] = 0,
    load: Annotated[float | None, typer.Option(help="copies and speed that keep the workers so busy: 0.7")] = None,
    copies: Annotated[int | None, typer.Option(help="superpose so many copies with prefixes of their own")] = None,
    rate_scale: Annotated[float, typer.Option(help="compress time by that factor")] = 1.0,
    model: Annotated[str, typer.Option(help="whose speed is taken")] = "Llama-3-70B",
    gpu: Annotated[str, typer.Option()] = "H100",
    dtype: Annotated[str, typer.Option(help="of the weights: bfloat16 or fp8")] = "fp8",
    tp: Annotated[int, typer.Option(help="GPUs of a worker")] = 4,
    decode_tp: Annotated[int | None, typer.Option(help="of a worker that decodes [default: as --tp]")] = None,
    step_tokens: Annotated[int, typer.Option(help="most tokens of a step")] = 8192,
    rates: Annotated[Path | None, typer.Option(help="JSON with fitted rates instead, as /status shows them")] = None,
    kv_tokens: Annotated[int | None, typer.Option(help="room for KV on a worker [default: the GPUs' memory]")] = None,
    kv_bytes: Annotated[int | None, typer.Option(help="of a token [default: the model's]")] = None,
    store_tokens: Annotated[int, typer.Option(help="room for KV in each node's store")] = 0,
    max_sequences: Annotated[int, typer.Option(help="that run on a worker at once")] = 256,
    autoscaling: Annotated[str, typer.Option(help="policy: slo, utilization:0.7, fixed, ...")] = "",
    scale: Annotated[str | None, typer.Option(help="MIN..MAX GPUs for --autoscaling")] = None,
    start_s: Annotated[float, typer.Option(help="to start a worker")] = 30.0,
    failures: Annotated[str, typer.Option(help="when which worker dies: 60:0,90:3, or a file of such lines")] = "",
    report_s: Annotated[float, typer.Option(help="between two reports of a worker's load")] = 0.1,
    cache_s: Annotated[float, typer.Option(help="between two reports of its cache")] = 0.1,
    slo_ttft: Annotated[float, typer.Option(help="seconds")] = 30.0,
    slo_itl: Annotated[float, typer.Option(help="seconds")] = 0.1,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the figures there")] = None,
    html_file: Annotated[Path | None, typer.Option("--html", help="write a page with plots there")] = None,
) -> None:
    """Replay a trace on a simulated cluster that runs the real placement, admission, plan and caches."""
    try:
        requests = read(trace)
        workers, prefill = _pools(workers, 0 if aggregated else prefill, decode)
        shape = Shape(tp), Shape(decode_tp or tp)
        hardware = _hardware(model, gpu, dtype, shape, step_tokens, rates, kv_tokens, kv_bytes)
        settings = SimSettings(
            block_size=requests.block_size,
            workers=workers,
            prefill=prefill,
            workers_per_node=max(1, NODE_GPUS // max(tp, decode_tp or tp)),
            shards=(tp, decode_tp or tp),
            store_tokens=store_tokens,
            max_sequences=max_sequences,
            placement=placement,
            autoscaling=autoscaling,
            scale=_scale(scale),
            start_s=start_s,
            failures=_failures(failures),
            report_s=report_s,
            cache_s=cache_s,
            ttft_slo_ms=1000 * slo_ttft,
            itl_slo_ms=1000 * slo_itl,
            seed=seed,
            **hardware,
        )
        arriving, settings, asked = _arriving(requests, settings, load, copies, rate_scale)
        result = run(islice(arriving, limit) if limit else arriving, settings)
        values = {"name": f"{requests.name}, {placement}", **asked, **result.to_json()}
        report.show([values], console)
        if json_file:
            report.write_json(values, json_file)
        if html_file:
            report.write_html([values], html_file)
    except TandemError as error:
        fail(error.message)


def _pools(workers: int, prefill: int | None, decode: int | None) -> tuple[int, int | None]:
    """(workers in all, those of them that prefill; None: as the trace needs)."""
    if decode is None:
        return workers, prefill
    if prefill is None:
        return workers, workers - decode
    return prefill + decode, prefill


def _hardware(
    model: str,
    gpu: str,
    dtype: str,
    shapes: tuple[Shape, Shape],
    step_tokens: int,
    rates: Path | None,
    kv_tokens: int | None,
    kv_bytes: int | None,
) -> dict[str, Any]:
    """The workers' speed and memory, as fields of SimSettings."""
    if rates:
        known = _rates(rates)
        return {"rates": known, "kv_tokens": kv_tokens or 400_000, "kv_bytes": kv_bytes or 163_840}
    prefill, decode = (speed(model, gpu, shape, dtype, step_tokens) for shape in shapes)
    room = min(prefill.kv_tokens, decode.kv_tokens)
    if not room:
        raise ConfigError(f"{model} in {dtype} does not fit into {shapes[0].gpus} x {gpu}; raise --tp")
    return {
        "rates": prefill.rates,
        "decode_rates": decode.rates if shapes[0] != shapes[1] else None,
        "kv_tokens": kv_tokens or room,
        "kv_bytes": kv_bytes or prefill.kv_bytes,
    }


def _arriving(
    trace: Trace, settings: SimSettings, load: float | None, copies: int | None, rate_scale: float
) -> tuple[Iterable[TraceRequest], SimSettings, dict[str, float]]:
    """(requests, settings with the pools that suit them, how the trace was scaled)."""
    if settings.prefill is None and settings.workers > 1:
        settings = settings.changed(prefill=work(trace, settings).split(settings.workers))
    if load is not None:
        wanted = copies_for(load, trace, settings)
        copies = copies or max(1, round(wanted))
        rate_scale *= wanted / copies
    copies = copies or 1
    asked: dict[str, float] = {"copies": copies, "rate_scale": rate_scale}
    if any(r.think_s is not None for r in trace.requests):
        return faster(superpose(trace, copies, settings.seed), rate_scale).requests, settings, asked
    return scaled(trace, copies, rate_scale, settings.seed), settings, asked


def _rates(path: Path) -> Rates:
    try:
        values = json.loads(path.read_text())
        known = {name: value for name, value in values.items() if name in asdict(PRIOR)}
        fields: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in known.items()}
        return Rates(**fields)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} holds no rates ({error}); it is JSON with {', '.join(asdict(PRIOR))}") from error


def _scale(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    least, dots, most = text.partition("..")
    if not dots or not least.isdecimal() or not most.isdecimal() or int(least) > int(most):
        raise ConfigError(f"--scale {text}: give MIN..MAX GPUs, such as 4..32")
    return int(least), int(most)


def _failures(text: str) -> tuple[tuple[float, int], ...]:
    try:
        if text and Path(text).is_file():
            text = Path(text).read_text()
        pairs = [part.split(":") for part in text.replace("\n", ",").split(",") if part.strip()]
        return tuple(sorted((float(when), int(worker)) for when, worker in pairs))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--failures {text}: give SECONDS:WORKER, separated by commas, such as 60:0,90:3") from error

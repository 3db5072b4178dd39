"""What the experiments share: a cluster of known hardware, runs with names, and where their figures go."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from cluster.errors import TandemError
from loadtests.simulator import report
from loadtests.simulator.generators import read
from loadtests.simulator.hardware import Shape, speed
from loadtests.simulator.settings import SimSettings
from loadtests.simulator.simulation import simulate
from loadtests.simulator.trace import Trace
from loadtests.simulator.transform import limit

NODE_GPUS = 8
WIDE = 130  # characters: lines that wrap are better than figures that are cut away

TraceOption = Annotated[str, typer.Option("--trace", help="a trace file, or a text such as sessions:rate=1")]
LimitOption = Annotated[int, typer.Option("--limit", help="only the first so many requests; 0: all")]
SeedOption = Annotated[int, typer.Option("--seed")]
JsonOption = Annotated[Path | None, typer.Option("--json", help="write the rows there")]
HtmlOption = Annotated[Path | None, typer.Option("--html", help="write a page with plots there")]
Row = dict[str, Any]
Results = list[dict[str, Any]]


def settings(
    trace: Trace, model: str, gpu: str, dtype: str, tp: int, workers: int, prefill: int, **others: Any
) -> SimSettings:
    """Equal workers; `others` are further fields of SimSettings. Raises ConfigError when the model does not fit."""
    worker = speed(model, gpu, Shape(tp), dtype, others.pop("step_tokens", 2048))
    known = {"kv_tokens": worker.kv_tokens, "kv_bytes": worker.kv_bytes, "workers_per_node": max(1, NODE_GPUS // tp)}
    return SimSettings(
        rates=worker.rates,
        block_size=trace.block_size,
        workers=workers,
        prefill=prefill,
        shards=(tp, tp),
        **(known | others),
    )


def run(name: str, trace: Trace, how: SimSettings) -> dict[str, Any]:
    """The result as JSON, under that name."""
    return {"name": name, **simulate(trace.requests, how).to_json()}


def trace_of(text: str, most: int) -> Trace:
    """The file, or what the text describes, or the first so many requests of it."""
    return limit(read(text), most) if most else read(text)


def finish(title: str, rows: Sequence[Row], results: Results, json: Path | None, html: Path | None) -> None:
    """Show the rows, and write what was asked for."""
    report.show_rows(title, rows, Console(width=max(WIDE, Console().width)))
    if json:
        report.write_json({"experiment": title, "rows": list(rows)}, json)
    if html:
        report.write_html(results, html, title)


def command(main: Callable[..., None]) -> None:
    """Run it with the arguments of the command line; what the user got wrong is one line and exit code 1."""
    try:
        typer.run(main)
    except TandemError as error:
        Console(stderr=True).print(error.message, style="red", markup=False, highlight=False, soft_wrap=True)
        raise SystemExit(1) from error
